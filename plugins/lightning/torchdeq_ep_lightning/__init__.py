"""Equilibrium propagation in Lightning: callbacks, a data module, and the networks of Laborieux & Zenke."""

from torchdeq_ep_lightning.callbacks import AlignmentMonitor as AlignmentMonitor
from torchdeq_ep_lightning.callbacks import Homeostasis as Homeostasis
from torchdeq_ep_lightning.callbacks import NudgeStats as NudgeStats
from torchdeq_ep_lightning.callbacks import SwapBackward as SwapBackward
from torchdeq_ep_lightning.data import ImageData as ImageData
from torchdeq_ep_lightning.module import VectorFieldClassifier as VectorFieldClassifier
