"""Proof by a trial run that the rows of an FFN may be removed one by one.

Hidden units that nothing tells apart may be permuted: the output stays. Where it does not, what
looks like an FFN is none.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from yopo.adapters.ffn import Ffn, Slot
from yopo.errors import UnsupportedModelError

_TOLERANCE = 1e-2
"""Relative change of an output that rounding may cause; a wrong permutation changes it all."""


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
    alone = [ffn for ffn in ffns if ffn.name not in before]
    before |= _outputs_alone(model, alone)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(ffn.rows, generator=generator, device="cpu") for ffn in ffns]
    moved: list[tuple[Slot, Tensor]] = []
    try:
        for ffn, order_F in zip(ffns, orders, strict=True):
            for slot in ffn.slots:
                _permute(slot, order_F)
                moved.append((slot, order_F))
        after, later_problem = _contract_outputs(model, ffns)
        after |= _outputs_alone(model, alone)
    finally:
        for slot, order_F in moved:
            _permute(slot, order_F.argsort())
    reasons = {}
    for ffn in ffns:
        old, new = before.get(ffn.name), after.get(ffn.name)
        if old is None or new is None or old.shape != new.shape:
            reasons[ffn.name] = (
                f"`{ffn.path}` looks like an FFN, but "
                f"{problem or later_problem or 'it took no part in a trial run'}, so yopo cannot "
                "prove that its rows may be removed."
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
    with _watched(model, ffns) as outputs:
        try:
            takes_cache = "use_cache" in inspect.signature(model.forward).parameters
            model(**trial_inputs(model), **({"use_cache": False} if takes_cache else {}))
        except Exception as error:  # whatever a model may raise on inputs it was not made for
            first_line = str(error).strip().partition("\n")[0]
            kind = type(error).__name__
            return {}, f"the model could not be run on made-up inputs ({kind}: {first_line})"
    return outputs, ""


def _outputs_alone(model: nn.Module, ffns: Sequence[Ffn]) -> dict[str, Tensor]:
    """Run each module that holds an FFN on made-up hidden states, if it takes nothing else."""
    with _watched(model, ffns) as outputs:
        for ffn in ffns:
            weight_FD = ffn.expand[0].read(ffn.rows)
            states_TD = torch.randn(
                (1, 8, weight_FD.shape[1]), generator=torch.Generator().manual_seed(0), device="cpu"
            )
            with suppress(Exception):
                model.get_submodule(ffn.path)(states_TD.to(weight_FD))
    return outputs


@contextmanager
def _watched(model: nn.Module, ffns: Sequence[Ffn]) -> Iterator[dict[str, Tensor]]:
    """Collect what the contract matrices of `ffns` give while `model` runs, and leave no trace."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor):
                outputs[name] = output.detach().double()

        return hook

    handles = [ffn.contract.module.register_forward_hook(keep(ffn.name)) for ffn in ffns]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), _same_noise(model):
            yield outputs
    finally:
        for module, training in modes.items():
            module.training = training
        for handle in handles:
            handle.remove()


@contextmanager
def _same_noise(model: nn.Module) -> Iterator[None]:
    """Let models that draw random numbers draw the same in every run, and leave no trace."""
    device = next(model.parameters()).device
    indices = [] if device.type == "cpu" else [device.index or 0]
    kind = {} if device.type == "cpu" else {"device_type": device.type}
    with torch.random.fork_rng(devices=indices, **kind):
        yield


def _permute(slot: Slot, order_F: Tensor) -> None:
    with torch.inference_mode():  # which may write into weights that were made in it, and others
        view = slot.read(len(order_F))
        view.copy_(view[order_F.to(view.device)])
