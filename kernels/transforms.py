"""What a kernel lacks beside plain JAX: vmap, and meshes that split a batch."""


def over_batch(compute, problem, *arrays):
  return compute(problem, *arrays)
