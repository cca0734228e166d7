"""Physical networks, solved without torch's knowledge, with the gradients that are expected of them."""

import torch
from problems import contraction

import torchdeq_ep as tep


class Network:
    """`F(z) = W tanh(z) P + x - z` with a symmetric Jacobian `W diag W^T - I`, and a solver that knows no gradients."""

    def __init__(self, dtype=torch.float64, batch=3, n=5):
        self.theta = contraction(n, 0, 0.7).to(dtype).requires_grad_()
        self.x = torch.randn(batch, n, dtype=dtype, requires_grad=True)

    def map(self, z, theta, x):
        return torch.tanh(z @ theta.T) @ theta + x

    def force(self, z, theta, x):
        return self.map(z, theta, x) - z

    def solve(self, current):
        theta, x = self.theta.detach(), self.x.detach()
        z = torch.zeros_like(x)
        for _ in range(60):
            z = self.map(z, theta, x) + current
        return z

    def loss(self, z):
        return (z**2).sum() + z.sum() ** 2

    def gradients(self, **options):
        z = tep.attach_equilibrium(self.solve, self.force, self.theta, self.x, **options)
        return torch.autograd.grad(self.loss(z), (self.theta, self.x))

    def reference(self, backward):
        z = tep.attach(lambda z: self.map(z, self.theta, self.x), self.solve(torch.zeros(())), backward=backward)
        return torch.autograd.grad(self.loss(z), (self.theta, self.x))


class Springs(Network):
    """`F(z) = x - W^T W z - z`, solved directly."""

    def force(self, z, theta, x):
        return x - z @ theta.T @ theta - z

    def map(self, z, theta, x):
        return z + 0.5 * self.force(z, theta, x)

    def solve(self, current):
        theta = self.theta.detach()
        return (self.x.detach() + current) @ torch.linalg.inv(theta.T @ theta + torch.eye(len(theta)).to(theta))
