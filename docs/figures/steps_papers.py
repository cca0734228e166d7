"""Milliseconds of a gradient of the papers' public code, compiled by JAX, for nudges of one, two and four points.

`steps.py` runs it with a Python that has jax and flax, on a checkout of generalized-holo-ep (30592f5):

    python docs/figures/steps_papers.py path/to/generalized-holo-ep 0.05

The gradient is that of Table 1: 150 steps of the free phase, 20 of each nudged one, batches of 50. Its cost depends
neither on the weights nor on the images. Times are those of the processor, on one thread, without compilation.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import jax
import jax.numpy as jnp
import numpy as np

BATCH, FREE_STEPS, NUDGED_STEPS, POINTS, ROUNDS = 50, 150, 20, (1, 2, 4), 15


def build(checkout: Path):
    """The papers' model of Table 1. What their files import and do not use, or do not have, is given as `None`."""
    sys.path.insert(0, str(checkout))
    if not hasattr(jax, "device_put_replicated"):  # removed in newer versions
        jax.device_put_replicated = None
    import utils.funcs

    utils.funcs.dalify = utils.funcs.ff_exc_fb_inh = None
    from models.dyn import DiscreteDynamics
    from models.vfs import mlp_discrete_vf

    layers = json.loads((checkout / "arch" / "mlp_2-256.json").read_text())
    shapes = {name: tuple(shape) for name, shape in layers["shapes"].items()}
    sizes = {name: shape[0] for name, shape in shapes.items()}
    activation = utils.funcs.get_activation("sigmoid")
    field = mlp_discrete_vf(shapes=shapes, sizes=sizes, connections=layers["connections"], loss="xent", act=activation)
    return DiscreteDynamics(vf=field, seed=0)


def milliseconds(model, beta: float, points: int) -> float:
    """The median of a gradient's time."""
    random = np.random.default_rng(0)
    x = random.random((BATCH, 784), dtype=np.float32)
    y = np.eye(10, dtype=np.float32)[random.integers(0, 10, BATCH)]
    params = model.init_params(jnp.ones((1, 784)), jnp.zeros((1, 10)))

    @jax.jit
    def gradient(params, x, y):
        free = model.fwd(params, model.batch_nrn(x), x, y, 0.0, FREE_STEPS)
        return model.hep_vf(params, free, x, y, NUDGED_STEPS, beta, points)

    times = []
    for _ in range(1 + ROUNDS):
        start = time.process_time()
        jax.block_until_ready(gradient(params, x, y))
        times.append(1e3 * (time.process_time() - start))
    return round(statistics.median(times[1:]), 1)


if __name__ == "__main__":
    papers = build(Path(sys.argv[1]))
    found = {points: milliseconds(papers, float(sys.argv[2]), points) for points in POINTS}
    sys.stdout.write(json.dumps(found) + "\n")
