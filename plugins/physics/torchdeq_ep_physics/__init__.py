"""Physical networks as equilibrium layers, trained by equilibrium propagation, with ngspice as a solver."""

from torchdeq_ep_physics.annealing import Annealing as Annealing
from torchdeq_ep_physics.checks import NoEquilibriumError as NoEquilibriumError
from torchdeq_ep_physics.checks import StateReport as StateReport
from torchdeq_ep_physics.checks import UnconvergedStateWarning as UnconvergedStateWarning
from torchdeq_ep_physics.checks import UnstableStateWarning as UnstableStateWarning
from torchdeq_ep_physics.diodes import DiodeLaw as DiodeLaw
from torchdeq_ep_physics.elastic import ElasticNetwork as ElasticNetwork
from torchdeq_ep_physics.hardware import Drift as Drift
from torchdeq_ep_physics.hardware import Mismatch as Mismatch
from torchdeq_ep_physics.hardware import PulsedSGD as PulsedSGD
from torchdeq_ep_physics.hardware import Quantised as Quantised
from torchdeq_ep_physics.hopfield import HopfieldNetwork as HopfieldNetwork
from torchdeq_ep_physics.netlist import Netlist as Netlist
from torchdeq_ep_physics.netlist_gradient import NetlistReport as NetlistReport
from torchdeq_ep_physics.netlist_terms import Trainable as Trainable
from torchdeq_ep_physics.ngspice import Ngspice as Ngspice
from torchdeq_ep_physics.oscillators import OscillatorNetwork as OscillatorNetwork
from torchdeq_ep_physics.resistive import ResistiveNetwork as ResistiveNetwork
from torchdeq_ep_physics.resistive import differential as differential
from torchdeq_ep_physics.spice_process import NgspiceError as NgspiceError
from torchdeq_ep_physics.spice_process import NgspiceTimeoutError as NgspiceTimeoutError
from torchdeq_ep_physics.spice_process import SpiceProgram as SpiceProgram
from torchdeq_ep_physics.spice_process import ngspice_available as ngspice_available
from torchdeq_ep_physics.system import NoEnergyError as NoEnergyError
from torchdeq_ep_physics.system import PhysicalSystem as PhysicalSystem
