"""DEQ cores that torchdeq knows by name, and the option `--backward`: for models that are built from arguments."""

from __future__ import annotations

import argparse
from typing import Any

from torchdeq.core import DEQIndexing, DEQSliced, register_deq

from torchdeq_ep.host.switching import DEFAULT_BACKWARD, switch
from torchdeq_ep.modes import get_backward


class EPSliced(DEQSliced):  # type: ignore[misc]
    """The core `"ep-sliced"`: torchdeq's `"sliced"`, differentiated by the mode that the option `backward` names.

    Args:
        args: A Namespace, dict or DEQConfig with torchdeq's options, and `backward`: a spec or a mode.
        **kwargs: Further options.

    Raises:
        UnknownBackwardError: If no backward mode has that name.
        InvalidOptionError: If the mode has no such option, or the option no such value.

    Example:
        >>> import torchdeq, torchdeq_ep
        >>> type(torchdeq.get_deq(core="ep-sliced", backward="ep:beta=0.01")).__name__
        'EPSliced'
    """

    def __init__(self, args: Any = None, **kwargs: Any) -> None:
        super().__init__(args, **kwargs)
        switch(self, get_backward(self.args.get("backward", DEFAULT_BACKWARD)))


class EPIndexing(DEQIndexing):  # type: ignore[misc]
    """The core `"ep-indexing"`: torchdeq's `"indexing"`, differentiated by the mode that the option `backward` names.

    Args:
        args: A Namespace, dict or DEQConfig with torchdeq's options, and `backward`: a spec or a mode.
        **kwargs: Further options.

    Raises:
        UnknownBackwardError: If no backward mode has that name.
        InvalidOptionError: If the mode has no such option, or the option no such value.

    Example:
        >>> import torchdeq, torchdeq_ep
        >>> type(torchdeq.get_deq(core="ep-indexing", backward="aep")).__name__
        'EPIndexing'
    """

    def __init__(self, args: Any = None, **kwargs: Any) -> None:
        super().__init__(args, **kwargs)
        switch(self, get_backward(self.args.get("backward", DEFAULT_BACKWARD)))


def add_ep_args(parser: argparse.ArgumentParser) -> None:
    """Add the option `--backward` to a parser, beside those of `torchdeq.add_deq_args`.

    Args:
        parser: An argparse parser; its Namespace can be given to `torchdeq.get_deq` with an `"ep-..."` core, or its
            `backward` to [`use_backward`][torchdeq_ep.use_backward].

    Returns:
        Nothing.

    Raises:
        argparse.ArgumentError: If the parser has such an option already.

    Example:
        >>> import argparse, torchdeq_ep as tep
        >>> parser = argparse.ArgumentParser()
        >>> tep.add_ep_args(parser)
        >>> parser.parse_args(["--backward", "hep:n_points=6"]).backward
        'hep:n_points=6'
    """
    parser.add_argument(
        "--backward",
        default=DEFAULT_BACKWARD,
        type=_spec,
        metavar="SPEC",
        help="backward mode and its options, e.g. ep, hep:n_points=6,beta=0.1, ift (default: %(default)s); "
        "`torchdeq-ep list` names them all",
    )


def _spec(text: str) -> str:
    try:
        get_backward(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


register_deq("ep-sliced", EPSliced)
register_deq("ep-indexing", EPIndexing)
