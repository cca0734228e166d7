"""The models of torchdeq's own zoo, built from a checkout as published: unmodified, small, with random weights.

The packages of the zoo share names such as `models` and `utils`, so one process builds one of them; `zoo.py` starts it.
A package that is not installed, and which the model does not use, is replaced by one whose every use raises.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchdeq.loss import fp_correction
from torchdeq.utils import add_deq_args

SEED = 0
FLOW = "--f_max_iter {} --f_solver simple_fixed_point_iter --n_states {} --grad {}"
IMAGE = "--f_solver fixed_point_iter --f_max_iter 100 --grad 3"
AUDIO = "--grad 3 --norm_type weight_norm"
GRAPHS = "--f_solver fixed_point_iter --norm_type spectral_norm --norm_clip --grad 5 --tau 0.5"
SEQUENCE = (
    "--norm_type weight_norm --ift --f_solver broyden --b_solver broyden --f_stop_mode rel --b_stop_mode rel "
    "--f_tol 1e-3 --b_tol 1e-3 --f_max_iter 35 --b_max_iter 35"
)
LANGUAGE = "--norm_type weight_norm --f_solver fixed_point_iter --f_stop_mode rel --f_tol 1e-3 --f_max_iter 0 --grad 12"


class Absent(ModuleType):
    """A package that is not installed. It can be imported, and whatever is called in it raises."""

    __path__: list[str] = []  # noqa: RUF012  so that its submodules can be imported too

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_: object, **__: object) -> None:
            raise NotImplementedError(f"{self.__name__}.{name} was called, and {self.__name__} is not installed.")

        return refuse


@dataclass
class Built:
    """A published model with a batch, what this process did for it to be built, and whether `f` is not trained."""

    model: nn.Module
    batch: Any
    loss: Callable[[nn.Module, Any], Tensor]
    done: list[str] = field(default_factory=list)
    frozen: bool = False


@dataclass(frozen=True)
class Published:
    """An entry of the zoo: its family, folder and options of its script, and who builds it."""

    family: str
    folder: str
    options: str
    build: Callable[[argparse.Namespace, Path], Built]

    def make(self, checkout: Path) -> Built:
        """The model with its batch. Raises whatever the zoo's code does."""
        folder = checkout / "deq-zoo" / self.folder
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not there: name a checkout of https://github.com/locuslab/torchdeq.")
        sys.path.insert(0, str(folder))
        parser = argparse.ArgumentParser()
        add_deq_args(parser)
        torch.manual_seed(SEED)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the zoo is of 2023, and says nothing of the switch
            return self.build(parser.parse_args(self.options.split()), folder)


def stand_in(*names: str) -> list[str]:
    """Replace those of these packages that are not installed; what was done, in words."""
    absent = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            absent.append(name)
            sys.modules[name] = Absent(name)
    names_of = ", ".join(f"`{name}`" for name in absent)
    return [f"Not installed, and replaced by what raises if it is called: {names_of}"] if absent else []


def _flow(args: argparse.Namespace, _: Path, all_grad: bool) -> Built:
    args.tiny, args.all_grad = True, all_grad
    args.large = args.huge = args.gigantic = args.gma = args.old_version = args.mixed_precision = False
    model = importlib.import_module("core.deq_flow").DEQFlow(args)
    images = [255 * functional.interpolate(torch.rand(1, 3, 32, 32), size=(128, 128)) for _ in range(2)]
    flow, valid = torch.randn(1, 2, 128, 128), torch.ones(1, 128, 128)

    def criterion(flows: list[Tensor], truth: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """As `flow_loss` of its `main.py`."""

        def distance(found: Tensor, truth: Tensor, known: Tensor) -> Tensor:
            return ((found - truth).abs() * known).mean()

        loss = fp_correction(distance, (flows, truth, known[:, None]), gamma=args.gamma)
        return loss, (flows[-1] - truth).norm(dim=1)

    batch = (*images, flow, valid, criterion)
    return Built(model, batch, lambda model, batch: model(*batch)[0])


def _multiscale(args: argparse.Namespace, folder: Path) -> Built:
    import yaml

    done = stand_in("termcolor")
    sys.path.insert(0, str(folder / "mdeq"))
    config = yaml.safe_load((folder / "configs" / "small.yaml").read_text())
    model = importlib.import_module("models.mdeq").get_cls_net(config, args)
    batch = torch.randn(2, 3, 4, 4), torch.randint(10, (2,))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return fp_correction(functional.cross_entropy, (model(batch[0]), batch[1]), gamma=args.gamma)

    return Built(model, batch, loss, done)


def _sequence(args: argparse.Namespace, _: Path, language: bool) -> Built:
    done = []
    if torch.version.cuda is None:
        torch.version.cuda = "0.0"
        done.append("Its adaptive softmax reads the version of CUDA, which a build for CPUs has none of: one was named")
    sizes: dict[str, Any] = {"n_layer": 3 if language else 2, "n_head": 2, "d_head": 16, "d_model": 32, "d_inner": 64}
    if language:
        args.mem = True
    else:
        sizes["eval_n_layer"] = 24
    model = importlib.import_module("models.deq_transformer").DEQTransformerLM(
        args, 100, dropout=0.05, dropatt=0.0, tgt_len=12, mem_len=12, **sizes
    )
    text = torch.randint(100, (3, 13))
    batch = text[:, :-1], text[:, 1:]
    return Built(model, batch, lambda model, batch: model(*batch, [], compute_jac_loss=False)[0].mean(), done)


def _implicit(args: argparse.Namespace, _: Path, kind: str, places: int, scale: float) -> Built:
    done = stand_in("plyfile", "skimage", "skimage.measure", "configargparse")
    model = importlib.import_module("modules.models").DEQINR(args, places, 32, 1, scale, kind, n_layers=1)
    batch = 2 * torch.rand(64, places) - 1, torch.randn(64, 1)
    return Built(model, batch, lambda model, batch: (model(batch[0])["output"] - batch[1]).square().mean(), done)


def _graphs(args: argparse.Namespace, _: Path) -> Built:
    done = stand_in("torch_sparse", "networkx")
    nodes = 30
    edges = torch.rand(nodes, nodes) < 0.15
    dense = ((edges | edges.T).float() + torch.eye(nodes)).clamp(max=1)
    adjacency = (dense / dense.sum(1, keepdim=True)).to_sparse()
    with redirect_stdout(sys.stderr):  # it prints its options
        model = importlib.import_module("models_PPI").IGNN(args, 10, 8, 5, None, 0.5, kappa=0.98)
    batch = torch.randn(10, nodes), adjacency, torch.randint(2, (nodes, 5)).float()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return functional.binary_cross_entropy_with_logits(model(batch[0], batch[1]), batch[2])

    return Built(model, batch, loss, done)


class Inversion(nn.Module):
    """What its script optimises: the states of all times, from which the published `DEQLatentSpaceOpt` starts."""

    def __init__(self, layer: nn.Module, betas: Tensor, steps: int, size: int) -> None:
        super().__init__()
        times = [int(t) for t in torch.linspace(0, 800**0.5, steps).square()]  # the script's `skip_type quad`
        latent = torch.randn(1, 3, size, size)
        self.layer = layer
        self.states = nn.Parameter(latent.repeat_interleave(steps + 1, dim=0))
        self.injection = layer.get_ddim_injection(self.states, times, betas, 1)

    def forward(self, image: Tensor) -> Tensor:
        """The loss of the script: how far the image at the end of the diffusion is from this one."""
        found: Tensor = self.layer(self.states, dict(self.injection))
        return (found[-1] - image).square().sum(dim=(1, 2, 3)).mean()


def _inversion(args: argparse.Namespace, _: Path) -> Built:
    done = stand_in("wandb", "turtle")
    if not torch.cuda.is_available():
        Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment]
        done.append("`f` calls `.cuda()`, and there is no GPU here: tensors stay where they are")
    size = 8
    config = SimpleNamespace(
        model=SimpleNamespace(
            type="simple", in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[4],
            dropout=0.1, resamp_with_conv=True,
        ),
        data=SimpleNamespace(image_size=size),
        diffusion=SimpleNamespace(num_diffusion_timesteps=1000),
    )  # fmt: skip
    network = importlib.import_module("models.diffusion").Model(config).eval().requires_grad_(False)
    layer = importlib.import_module("functions.latent_space_opt_sddim").DEQLatentSpaceOpt(args, network)
    model = Inversion(layer, torch.linspace(0.0001, 0.02, 1000), 4, size)
    return Built(model, torch.randn(1, 3, size, size), lambda model, batch: model(batch), done, frozen=True)


ZOO: dict[str, Published] = {
    "deq-flow": Published("flow", "deq-flow", FLOW.format(36, 6, 1), lambda a, f: _flow(a, f, False)),
    "deq-flow, all_grad": Published("flow", "deq-flow", FLOW.format(40, 2, 3), lambda a, f: _flow(a, f, True)),
    "mdeq": Published(
        "multiscale vision",
        "mdeq/mdeq_cifar",
        "--norm_type weight_norm --f_solver broyden --f_max_iter 22 --grad 5 --tau 0.5",
        _multiscale,
    ),
    "deq-seq": Published("sequence", "deq-seq", SEQUENCE, lambda a, f: _sequence(a, f, False)),
    "deq-lm": Published("sequence", "deq-lm", LANGUAGE, lambda a, f: _sequence(a, f, True)),
    "deq-inr, fourier": Published(
        "implicit representation", "deq-inr", IMAGE, lambda a, f: _implicit(a, f, "fourier", 2, 256.0)
    ),
    "deq-inr, siren_like": Published(
        "implicit representation", "deq-inr", AUDIO, lambda a, f: _implicit(a, f, "siren_like", 1, 25000.0)
    ),
    "ignn": Published("graphs", "ignn/nodeclassification", GRAPHS, _graphs),
    "deq-ddim": Published(
        "diffusion inversion",
        "deq-ddim",
        "--f_solver anderson --f_max_iter 15 --tau 0.1",
        _inversion,
    ),
}
