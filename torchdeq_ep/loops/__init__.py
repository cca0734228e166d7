"""Loops written by hand: steps of a map with the backward of one's choice, whatever the loop is part of."""

from torchdeq_ep.loops.report import LoopReport as LoopReport
from torchdeq_ep.loops.running import loop as loop
from torchdeq_ep.loops.running import loops_by as loops_by
