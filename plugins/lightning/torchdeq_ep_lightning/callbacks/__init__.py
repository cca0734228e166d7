"""Callbacks for any LightningModule that contains torchdeq DEQs; after training it is as it was found."""

from torchdeq_ep_lightning.callbacks.alignment import AlignmentMonitor as AlignmentMonitor
from torchdeq_ep_lightning.callbacks.homeostasis import Homeostasis as Homeostasis
from torchdeq_ep_lightning.callbacks.lookup import loss_scale as loss_scale
from torchdeq_ep_lightning.callbacks.means import Means as Means
from torchdeq_ep_lightning.callbacks.nudge_stats import NudgeStats as NudgeStats
from torchdeq_ep_lightning.callbacks.per_sample import PerSample as PerSample
from torchdeq_ep_lightning.callbacks.swap import SwapBackward as SwapBackward
