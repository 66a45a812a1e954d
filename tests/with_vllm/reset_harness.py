"""What tests of resets share."""

from contextlib import contextmanager

from vllm.v1.core.sched.interface import PauseState


@contextmanager
def other_weights(server):
    """Updated in place, as trainers do."""
    layers = server.core.model_executor.driver_worker.worker.model_runner.model.model.layers
    for layer in layers:
        layer.input_layernorm.weight.data.mul_(-0.7)
    yield
    for layer in layers:
        layer.input_layernorm.weight.data.div_(-0.7)


def reset(server, running=False):
    """``running``: requests that run lose their blocks. vLLM then demands that no step is in flight."""
    scheduler = server.scheduler
    if running:
        scheduler.set_pause_state(PauseState.PAUSED_ALL)
        while server.core.batch_queue:
            server.llm.llm_engine.step()
    try:
        return server.llm.reset_prefix_cache(reset_running_requests=running, reset_connector=True)
    finally:
        scheduler.set_pause_state(PauseState.UNPAUSED)


def is_stored(server, prompt):
    return server.manager.keeper.get(server.place_of(prompt, 256).key) is not None


def hits(server):
    return {key: n for key, n in server.manager.counts.items() if key[0] == "hits" and n}


def computed_anew(server, prompt):
    """What a request says that finds nothing: what vLLM alone says with the weights of now."""
    before = hits(server)
    (said,) = server.ask(prompt, context_tokens=256)
    server.forget()
    assert [said] == server.ask(prompt, contexts=False)
    server.forget()
    assert hits(server) == before
    return said
