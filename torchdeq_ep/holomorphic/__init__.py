"""Evaluating real models at complex states: rules, refusals, and a test for analyticity."""

# The modules of rules register what they define, over the names that `native` covers in all namespaces.
from torchdeq_ep.holomorphic import native as _native

# isort: split
from torchdeq_ep.holomorphic import attention as _attention
from torchdeq_ep.holomorphic import elementwise as _elementwise
from torchdeq_ep.holomorphic import linear as _linear
from torchdeq_ep.holomorphic import losses as _losses
from torchdeq_ep.holomorphic import normalization as _normalization
from torchdeq_ep.holomorphic import piecewise as _piecewise
from torchdeq_ep.holomorphic.analyticity import AnalyticityReport as AnalyticityReport
from torchdeq_ep.holomorphic.analyticity import check as check
from torchdeq_ep.holomorphic.context import Crossing as Crossing
from torchdeq_ep.holomorphic.context import HolomorphicMap as HolomorphicMap
from torchdeq_ep.holomorphic.context import HolomorphicMode as HolomorphicMode
from torchdeq_ep.holomorphic.context import Piecewise as Piecewise
from torchdeq_ep.holomorphic.context import holomorphic_map as holomorphic_map
from torchdeq_ep.holomorphic.context import mode as mode
from torchdeq_ep.holomorphic.registry import register_rule as register_rule
from torchdeq_ep.holomorphic.registry import rules_table as rules_table

del _attention, _elementwise, _linear, _losses, _native, _normalization, _piecewise
