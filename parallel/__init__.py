"""How a model and its training step are spread over processes: mesh, sharding, collectives, recomputation."""
