"""`make traffic`: bytes and operations of kernels, compared with the minimum and with other code; and a cost model."""
