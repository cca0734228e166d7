"""The gradients of torchdeq_ep for the deep-equilibrium reconstructions of deepinv.

`torchdeq_ep.use_backward(model, "ift")` finds this module by its entry point, and switches every deepinv optimiser with
`DEQ=True` inside the model.
"""

from torchdeq_ep_deepinv.metrics import proximal_metric as proximal_metric
from torchdeq_ep_deepinv.switching import DeepinvHandle as DeepinvHandle
from torchdeq_ep_deepinv.switching import adapt as adapt
