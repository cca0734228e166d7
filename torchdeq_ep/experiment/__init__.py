"""The homeostasis experiment: vector-field networks with misaligned weights, trained by exact gradients and by EP."""

from torchdeq_ep.experiment.data import Images as Images
from torchdeq_ep.experiment.data import load_images as load_images
from torchdeq_ep.experiment.report import gap_closed as gap_closed
from torchdeq_ep.experiment.report import save_figure as save_figure
from torchdeq_ep.experiment.report import table as table
from torchdeq_ep.experiment.runs import run_all as run_all
from torchdeq_ep.experiment.runs import write_report as write_report
from torchdeq_ep.experiment.train import MODES as MODES
from torchdeq_ep.experiment.train import Epoch as Epoch
from torchdeq_ep.experiment.train import Run as Run
from torchdeq_ep.experiment.train import Setup as Setup
from torchdeq_ep.experiment.train import train as train
