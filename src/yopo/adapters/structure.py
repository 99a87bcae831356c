"""FFNs of architectures that no layout knows, found by what grows with a width of the config.

A matrix whose inputs grow with the field contracts, matrices around it whose outputs grow expand,
everything else of that size goes along. What is found this way is a guess until it is proved:
`prove` permutes the rows and runs the model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from yopo.adapters.ffn import Ffn, Slot
from yopo.adapters.skeleton import Probe
from yopo.errors import UnsupportedModelError

_TOLERANCE = 1e-2
"""Relative change of an output that rounding may cause; a wrong permutation changes it all."""


def ffns_by_structure(model: nn.Module, probe: Probe, claimed: set[str]) -> Iterator[Ffn]:
    """Yield the FFNs whose width `probe` sets and that no layout has claimed.

    Args:
        model: The model.
        probe: A config field and the parameters that grow with it.
        claimed: Names of parameters that belong to an FFN already.
    """
    grown = {name: axis for name, axis in probe.axes.items() if name not in claimed}
    matrices = {name: axis for name, axis in grown.items() if _matrix_axis(model, name) is not None}
    inputs = [name for name, axis in matrices.items() if axis != _matrix_axis(model, name)]
    outputs = [name for name, axis in matrices.items() if axis == _matrix_axis(model, name)]
    for contract in inputs:
        container = _container(contract, outputs)
        inside = [name for name in inputs if name.startswith(container)]
        if container and len(inside) == 1:
            yield from _ffn_in(model, probe, contract, container, grown, outputs)


def prove(model: nn.Module, ffns: Sequence[Ffn], seed: int = 0) -> dict[str, str]:
    """Check that permuting the rows of each FFN leaves the output of its contract matrix unchanged.

    The rows are permuted in place, the model is run on a few made-up inputs, and the rows are put
    back: moves, not arithmetic, so the weights end bit for bit as they were. An FFN that the run
    does not reach is run by itself.

    Returns:
        The names of the FFNs that were not proved, with the reason.

    Raises:
        UnsupportedModelError: If the weights are on the meta device.
    """
    if any(slot.parameter.is_meta for ffn in ffns for slot in ffn.slots):
        raise UnsupportedModelError(
            f"`{ffns[0].path}` looks like an FFN of an architecture that yopo does not know, and "
            "cannot be proved while its weights are on the meta device. Load the weights."
        )
    before, problem = _contract_outputs(model, ffns)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(ffn.rows, generator=generator, device="cpu") for ffn in ffns]
    moved: list[tuple[Slot, Tensor]] = []
    try:
        for ffn, order_F in zip(ffns, orders, strict=True):
            for slot in ffn.slots:
                _permute(slot, order_F)
                moved.append((slot, order_F))
        after, _ = _contract_outputs(model, ffns)
    finally:
        for slot, order_F in moved:
            _permute(slot, order_F.argsort())
    reasons = {}
    for ffn in ffns:
        old, new = before.get(ffn.name), after.get(ffn.name)
        if old is None or new is None or old.shape != new.shape:
            reasons[ffn.name] = (
                f"`{ffn.path}` looks like an FFN, but {problem or 'took no part in a trial run'}, "
                "so yopo cannot prove that its rows may be removed."
            )
        elif not (old - new).norm() <= _TOLERANCE * old.norm():
            reasons[ffn.name] = (
                f"`{ffn.path}` looks like an FFN of {ffn.rows} rows, but permuting its rows "
                "changes its output, so they cannot be removed one by one."
            )
    return reasons


def trial_inputs(model: nn.Module, tokens: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Return small made-up inputs for `model`, on its device: token ids, pixels or audio features.

    Raises:
        UnsupportedModelError: If yopo does not know what the model reads.
    """
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu")

    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = int(getattr(text, "vocab_size", None) or 2)
    ids = torch.randint(2, max(vocabulary, 3), (1, tokens), generator=generator, device="cpu")
    name = getattr(model, "main_input_name", "input_ids")
    if name == "input_ids":
        inputs = {"input_ids": ids}
    elif name == "pixel_values":
        size = getattr(config, "image_size", None) or config.vision_config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(config, "num_channels", 3)
        inputs = {"pixel_values": noise(1, channels, height, width)}
    elif name == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 1500)
        bins = getattr(config, "num_mel_bins", 80)
        inputs = {"input_features": noise(1, bins, frames)}
    elif name == "input_values":
        inputs = {"input_values": noise(1, 4000)}
    else:
        raise UnsupportedModelError(f"yopo does not know how to make a trial `{name}`.")
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    anchor = next(model.parameters())
    return {
        key: value.to(anchor.device, anchor.dtype if value.is_floating_point() else value.dtype)
        for key, value in inputs.items()
    }


def _contract_outputs(model: nn.Module, ffns: Sequence[Ffn]) -> tuple[dict[str, Tensor], str]:
    """Run `model` on trial inputs; return what each contract matrix gave, in float64.

    The second value says why the model could not be run, empty if it could.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor):
                outputs[name] = output.detach().double()

        return hook

    handles = [ffn.contract.module.register_forward_hook(keep(ffn.name)) for ffn in ffns]
    modes = {module: module.training for module in model.modules()}
    problem = ""
    try:
        model.eval()
        with torch.no_grad(), _same_noise(model):
            try:
                model(**trial_inputs(model))
            except Exception as error:  # whatever a model may raise on inputs it was not made for
                problem = f"the model could not be run on made-up inputs ({_brief(error)})"
            for ffn in ffns:
                if ffn.name not in outputs:
                    _run_alone(model, ffn)
    finally:
        for module, training in modes.items():
            module.training = training
        for handle in handles:
            handle.remove()
    return outputs, problem


def _run_alone(model: nn.Module, ffn: Ffn) -> None:
    """Run the module that holds `ffn` on made-up hidden states, if it takes nothing else."""
    weight_FD = ffn.expand[0].read(ffn.rows)
    states_TD = torch.randn(
        (1, 8, weight_FD.shape[1]), generator=torch.Generator().manual_seed(0), device="cpu"
    )
    with suppress(Exception):
        model.get_submodule(ffn.path)(states_TD.to(weight_FD))


@contextmanager
def _same_noise(model: nn.Module) -> Iterator[None]:
    """Let models that draw random numbers draw the same in every run, and leave no trace."""
    device = next(model.parameters()).device
    indices = [] if device.type == "cpu" else [device.index or 0]
    kind = {} if device.type == "cpu" else {"device_type": device.type}
    with torch.random.fork_rng(devices=indices, **kind):
        yield


def _brief(error: Exception) -> str:
    """Return the kind and the first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]


def _permute(slot: Slot, order_F: Tensor) -> None:
    with torch.inference_mode():  # which may write into weights that were made in it, and others
        view = slot.read(len(order_F))
        view.copy_(view[order_F.to(view.device)])


def _ffn_in(
    model: nn.Module,
    probe: Probe,
    contract: str,
    container: str,
    grown: dict[str, int],
    outputs: list[str],
) -> Iterator[Ffn]:
    contract_slot = _slot(model, contract, grown[contract])
    rows = contract_slot.parameter.shape[contract_slot.axis]
    expand: list[Slot] = []
    vectors: list[Slot] = []
    for name, axis in grown.items():
        if name == contract or not name.startswith(container):
            continue
        slot = _slot(model, name, axis)
        length = slot.parameter.shape[axis]
        starts = {rows: [0], 2 * rows: [0, rows]}.get(length, [])
        if not starts:
            return
        (expand if name in outputs else vectors).extend(
            Slot(slot.module, slot.name, axis, start) for start in starts
        )
    if 1 <= len(expand) <= 2:
        path = container.removesuffix(".")
        yield Ffn(
            name=path,
            path=path,
            rows=rows,
            expand=tuple(expand),
            contract=contract_slot,
            vectors=tuple(vectors),
            width=probe.field_for(rows),
            known=False,
        )


def _container(contract: str, outputs: list[str]) -> str:
    """Return the path, with a dot, of the innermost module that holds `contract` and an output."""
    path = contract
    while "." in path:
        path = path.rpartition(".")[0]
        if any(name.startswith(path + ".") for name in outputs):
            return path + "."
    return ""


def _slot(model: nn.Module, name: str, axis: int) -> Slot:
    path, _, key = name.rpartition(".")
    return Slot(model.get_submodule(path), key, axis)


def _matrix_axis(model: nn.Module, name: str) -> int | None:
    """Return the axis that runs over a matrix's outputs, None if `name` is not a linear map's."""
    module = model.get_submodule(name.rpartition(".")[0])
    if not name.endswith(".weight") or getattr(module, "weight", torch.empty(0)).dim() != 2:
        return None
    if type(module).__name__ == "Conv1D":
        return 1
    return 0 if isinstance(module, nn.Linear) else None
