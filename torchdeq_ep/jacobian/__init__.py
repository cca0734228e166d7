"""The Jacobian `J = df/dz` at a state: products with it, its spectrum, its symmetry, metrics that restore that."""

from torchdeq_ep.jacobian.linearization import Linearization as Linearization
from torchdeq_ep.jacobian.linearization import Product as Product
from torchdeq_ep.jacobian.linearization import dense_jacobian as dense_jacobian
from torchdeq_ep.jacobian.linearization import gaussian_probes as gaussian_probes
from torchdeq_ep.jacobian.linearization import jvp as jvp
from torchdeq_ep.jacobian.linearization import products as products
from torchdeq_ep.jacobian.linearization import vjp as vjp
from torchdeq_ep.jacobian.metric import ActivityMetric as ActivityMetric
from torchdeq_ep.jacobian.metric import Metric as Metric
from torchdeq_ep.jacobian.metric import OperatorMetric as OperatorMetric
from torchdeq_ep.jacobian.metric import automatic_metric as automatic_metric
from torchdeq_ep.jacobian.spectrum import FieldOfValues as FieldOfValues
from torchdeq_ep.jacobian.spectrum import field_of_values as field_of_values
from torchdeq_ep.jacobian.spectrum import spectral_radius as spectral_radius
from torchdeq_ep.jacobian.symmetry import Estimator as Estimator
from torchdeq_ep.jacobian.symmetry import SymmetryMeasurement as SymmetryMeasurement
from torchdeq_ep.jacobian.symmetry import measure_symmetry as measure_symmetry
from torchdeq_ep.jacobian.symmetry import symmetry_penalty as symmetry_penalty
from torchdeq_ep.jacobian.symmetry import symmetry_score as symmetry_score
from torchdeq_ep.nn.weights import weight_angle as weight_angle
