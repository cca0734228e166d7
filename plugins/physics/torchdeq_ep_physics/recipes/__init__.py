"""Recipes: experiments that train or measure physical networks. Each returns its figures, and can draw them."""

from torchdeq_ep_physics.recipes.circuits import Classification as Classification
from torchdeq_ep_physics.recipes.circuits import Data as Data
from torchdeq_ep_physics.recipes.circuits import Simulator as Simulator
from torchdeq_ep_physics.recipes.circuits import Task as Task
from torchdeq_ep_physics.recipes.circuits import amplifiers as amplifiers
from torchdeq_ep_physics.recipes.circuits import asymmetry as asymmetry
from torchdeq_ep_physics.recipes.circuits import classify as classify
from torchdeq_ep_physics.recipes.circuits import gradients as gradients
from torchdeq_ep_physics.recipes.circuits import load as load
from torchdeq_ep_physics.recipes.circuits import logits as logits
from torchdeq_ep_physics.recipes.circuits import simulated as simulated
from torchdeq_ep_physics.recipes.learning_rules import RuleResult as RuleResult
from torchdeq_ep_physics.recipes.learning_rules import contrast as contrast
from torchdeq_ep_physics.recipes.learning_rules import markdown as markdown
from torchdeq_ep_physics.recipes.learning_rules import rules as rules
from torchdeq_ep_physics.recipes.noise import NoisyInstrument as NoisyInstrument
from torchdeq_ep_physics.recipes.noise import instrument as instrument
from torchdeq_ep_physics.recipes.real_devices import devices as devices
from torchdeq_ep_physics.recipes.recollection import Recall as Recall
from torchdeq_ep_physics.recipes.recollection import pictures as pictures
from torchdeq_ep_physics.recipes.recollection import recall as recall
from torchdeq_ep_physics.recipes.springs import lattice as lattice
from torchdeq_ep_physics.recipes.springs import motion as motion
