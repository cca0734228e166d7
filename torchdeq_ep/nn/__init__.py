"""Layers that suit equilibrium propagation."""

from torchdeq_ep.nn.activations import DSiLU as DSiLU
from torchdeq_ep.nn.activations import ShiftedDSiLU as ShiftedDSiLU
from torchdeq_ep.nn.activations import ShiftedSigmoid as ShiftedSigmoid
from torchdeq_ep.nn.activations import dsilu as dsilu
from torchdeq_ep.nn.activations import shifted_dsilu as shifted_dsilu
from torchdeq_ep.nn.activations import shifted_sigmoid as shifted_sigmoid
from torchdeq_ep.nn.energy import EnergyMap as EnergyMap
from torchdeq_ep.nn.injection import InjectOnce as InjectOnce
from torchdeq_ep.nn.losses import ReadoutLoss as ReadoutLoss
from torchdeq_ep.nn.pooling import SoftmaxPool1d as SoftmaxPool1d
from torchdeq_ep.nn.pooling import SoftmaxPool2d as SoftmaxPool2d
from torchdeq_ep.nn.pooling import SoftmaxPool3d as SoftmaxPool3d
from torchdeq_ep.nn.pooling import softmax_pool as softmax_pool
from torchdeq_ep.nn.vector_field.base import NudgeMetric as NudgeMetric
from torchdeq_ep.nn.vector_field.base import VectorField as VectorField
from torchdeq_ep.nn.vector_field.cnn import VectorFieldCNN as VectorFieldCNN
from torchdeq_ep.nn.vector_field.mlp import VectorFieldMLP as VectorFieldMLP
