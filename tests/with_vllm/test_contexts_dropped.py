"""Contexts that are admitted with fewer rows than tokens, against a dense model in which the others are masked."""

import pytest
from both_harness import serving_both
from contexts_harness import ON
from harness import MODES, prompts

from kara_kernels.contexts.profile import Measured, Profile, ProfiledContext, keys_of

TOKENS = 256
DOCUMENT, OTHER, *QUESTIONS = prompts(TOKENS, TOKENS, 9, 5, 31, 40, seed=201)
METHODS = ("keydiff/int8", "knorm/int4")


def write_profile(path, catalogue, documents, method, rows):
    """A profile of documents that allows only packets of so many rows."""
    steps = [step for step in catalogue._header("", TOKENS, method).steps if step.rows == rows]
    measured = tuple(Measured(method, x.sections, x.ratio, x.nbytes, 0.0, x.rows, 0.01, 1.0) for x in steps)
    keys = [next(keys_of(document, [TOKENS])) for document in documents]
    contexts = {key: ProfiledContext(key, "", TOKENS, 1.0, 0.1, ("?",), measured) for key in keys}
    Profile("made", {}, (), contexts).save(path)


@pytest.fixture(scope="module", params=MODES)
def served_both(model, request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dropped")
    contexts = {**ON, "methods": METHODS, "profile": str(folder / "profile.json")}
    with serving_both(
        model, folder / "trace.jsonl", contexts=contexts, mode=request.param, max_num_batched_tokens=64
    ) as both:
        both.profile = folder / "profile.json"
        yield both


@pytest.fixture
def both(served_both):
    served_both.server.forget()
    return served_both


def allow(both, method, rows, *documents):
    write_profile(both.profile, both.manager.catalogue, documents, method, rows)
    both.manager.catalogue._take(Profile.load(both.profile))


def store(both, name, document, method="keydiff/int8", rows=68):
    allow(both, method, rows, document)
    both.store(name, document + QUESTIONS[0], TOKENS)
    copy = both.manager.keeper.get(both.server.place_of(document + QUESTIONS[0], TOKENS).key)
    assert copy.option.method == method


def test_rows_of_a_dropped_context_never_get_the_hashes_of_its_tokens(both, dense):
    """Requests that follow find no block of the first, whether they are admitted out of the same packet or want exact
    rows, and whether the first still runs or not."""
    store(both, "stored", DOCUMENT)
    pool = both.scheduler.kv_cache_manager.block_pool
    served = both.drive(
        {
            0: lambda both: both.add("first", DOCUMENT + QUESTIONS[0], 120, context_tokens=TOKENS),
            40: lambda both: both.add("second", DOCUMENT + QUESTIONS[1], 60, context_tokens=TOKENS),
            60: lambda both: both.add("exact", DOCUMENT + QUESTIONS[1], 60, contexts=False),
        }
    )
    assert [served[name].rows[0] is not None for name in ("first", "second", "exact")] == [True, True, False]
    assert served["first"].rows[0][2].shape[2] == 68
    dense.assert_equal(both.engine, served.values(), compressions=0)
    assert len(pool.cached_block_hash_to_block) == (TOKENS + 5 + 60) // 32  # those of the exact one
    both.assert_nothing_leaks()
