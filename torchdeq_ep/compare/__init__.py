"""Backward modes side by side on one model: how exact, how fast, how large."""

from torchdeq_ep.compare.measure import compare as compare
from torchdeq_ep.compare.table import Comparison as Comparison
from torchdeq_ep.compare.table import Row as Row
