"""`make traffic`: what kernels move and compute, against the floor and against what others do; and a cost model."""
