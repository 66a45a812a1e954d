"""Running requests, compressed while they decode: configuration, scheduler, runner and worker."""
