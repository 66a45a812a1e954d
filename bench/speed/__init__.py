"""`make bench`: one compression event on a CPU, the library's PyTorch path beside what users have today."""
