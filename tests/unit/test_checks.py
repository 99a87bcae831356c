"""Models that cannot be pruned: each is refused by name, with its way out, and left as it was."""

import pytest
import torch
from torch import distributed, nn
from torch.nn.utils import parametrizations, prune

import yopo
from yopo import UnsupportedModelError

# Neither quantised, sharded nor offloaded weights are made on a machine without these warnings.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def refusal(model):
    """Return the error that every way of pruning `model` ends in."""
    plan = yopo.PruningPlan(kept={"mlp": torch.tensor([0])}, rows={"mlp": 2}, ratio=0.5)
    attempts = [
        lambda: yopo.PolicyPruner().fit(model),
        lambda: yopo.PolicyPruner.prunenet(episodes=1).fit(model),
        lambda: yopo.plan_by_criterion(model, 0.3, criterion=yopo.criteria.row_norm),
        lambda: yopo.apply_plan(model, plan),
        lambda: yopo.find_ffns(model),
    ]
    messages = []
    for attempt in attempts:
        with pytest.raises(UnsupportedModelError) as caught:
            attempt()
        messages.append(str(caught.value))
    assert len(set(messages)) == 1
    return messages[0]


@pytest.fixture
def process_group():
    """Make this process a group of one, as a launcher would."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("model", [None, 3, nn.Linear(2, 2), nn.Sequential()], ids=repr)
def test_what_is_no_model_of_transformers_is_named(model):
    told = refusal(model)
    assert told.startswith(f"yopo prunes models of transformers, got a {type(model).__name__}")
    assert "Pass the `PreTrainedModel` itself." in told


def test_a_part_of_a_model_is_not_the_model(tiny_llama):
    assert "got a LlamaMLP" in refusal(tiny_llama().model.layers[0].mlp)


def test_a_model_inside_another_module_is_not_the_model(tiny_llama):
    assert "got a Sequential" in refusal(nn.Sequential(tiny_llama()))


def test_ddp_is_unwrapped_first(tiny_llama, process_group):
    told = refusal(nn.parallel.DistributedDataParallel(tiny_llama()))
    assert told == (
        "the model is wrapped in DistributedDataParallel. Prune `model.module` before wrapping it."
    )


def test_data_parallel_is_unwrapped_first(tiny_llama):
    assert "wrapped in DataParallel. Prune `model.module`" in refusal(nn.DataParallel(tiny_llama()))


def test_fsdp_comes_after_pruning(tiny_llama, process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(tiny_llama(), device_id=torch.device("cpu"))
    assert "wrapped in FullyShardedDataParallel" in refusal(model)


def test_a_model_whose_layers_are_wrapped_in_fsdp_is_refused_too(tiny_llama):
    wrapper = type("FullyShardedDataParallel", (nn.Sequential,), {})
    model = tiny_llama()
    model.model.layers[0].mlp = wrapper(model.model.layers[0].mlp)
    assert refusal(model) == "the model is sharded by FSDP. Prune it before wrapping it."


@pytest.mark.parametrize("whole", [True, False])
def test_weights_that_fsdp_spread_over_processes_are_refused(tiny_llama, process_group, whole):
    from torch.distributed.fsdp import fully_shard

    model = tiny_llama()
    mesh = distributed.init_device_mesh("cpu", (1,))
    fully_shard(model if whole else model.model.layers[1].mlp, mesh=mesh)
    told = refusal(model)
    assert "is a DTensor, spread over processes by FSDP or tensor parallelism" in told
    assert "Prune the model before spreading it." in told


def test_tensor_parallel_weights_are_refused(tiny_llama, process_group):
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = tiny_llama()
    mesh = distributed.init_device_mesh("cpu", (1,))
    parallelize_module(model, mesh, {"model.layers.0.mlp.up_proj": ColwiseParallel()})
    assert "`model.layers.0.mlp.up_proj.weight` is a DTensor" in refusal(model)


def test_weights_that_deepspeed_partitioned_are_refused(tiny_llama):
    model = tiny_llama()
    for parameter in model.parameters():  # as `deepspeed.zero.Init` leaves them
        parameter.ds_id, parameter.ds_shape = 0, parameter.shape
        parameter.data = torch.empty(0)
    assert "`model.embed_tokens.weight` is partitioned by DeepSpeed" in refusal(model)


def test_a_compiled_model_is_pruned_before(tiny_llama):
    assert refusal(torch.compile(tiny_llama())) == (
        "the model is compiled. Prune the original, `model._orig_mod`, then compile it again."
    )


def lora(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"]))


def lora_inside(model):
    return lora(model).base_model.model


def added_adapter(model):
    from peft import LoraConfig

    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    return model


def prompt(model):
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(model, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))


def merged_but_kept(model):
    model = lora(model)
    model.merge_adapter()
    return model


def disabled(model):
    model = lora(model)
    model.base_model.disable_adapter_layers()
    return model


def prompts_in_the_attention(model):
    from peft import AdaptionPromptConfig, get_peft_model

    config = AdaptionPromptConfig(adapter_layers=1, adapter_len=2, task_type="CAUSAL_LM")
    get_peft_model(model, config)
    return model


@pytest.mark.parametrize(
    "adapt",
    [
        lora,
        lora_inside,
        added_adapter,
        prompt,
        merged_but_kept,
        disabled,
        prompts_in_the_attention,
    ],
)
def test_peft_adapters_are_merged_first(tiny_llama, adapt):
    told = refusal(adapt(tiny_llama()))
    assert "the model carries PEFT adapters" in told
    assert "`model = model.merge_and_unload()` first, or prune before adding adapters" in told


def test_a_model_whose_adapters_were_merged_is_pruned(tiny_llama, logits):
    model = lora(tiny_llama()).merge_and_unload()
    yopo.apply_plan(model, yopo.plan_by_criterion(model, 0.3, criterion=yopo.criteria.row_norm))
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("part", [False, True])
def test_weights_that_torchao_packed_are_refused(tiny_llama, part):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = tiny_llama()
    quantize_(model.model.layers[1].mlp if part else model, Int8WeightOnlyConfig())
    told = refusal(model)
    assert "the model is quantised, and packed weights have no rows to remove" in told
    assert "Prune the unquantised model, then quantise it." in told


@pytest.mark.parametrize(
    ("shape", "dtype"), [((80, 32), torch.int8), ((1280, 1), torch.uint8)], ids=["8bit", "4bit"]
)
def test_weights_as_bitsandbytes_packs_them_are_refused(tiny_llama, shape, dtype):
    model = tiny_llama()
    packed = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
    model.model.layers[0].mlp.gate_proj.weight = packed
    assert f"`model.layers.0.mlp.gate_proj.weight` is a Tensor of {dtype}" in refusal(model)


@pytest.mark.parametrize("attribute", ["is_quantized", "hf_quantizer"])
def test_what_transformers_calls_quantised_is_refused(tiny_llama, attribute):
    model = tiny_llama()
    setattr(model, attribute, True)
    assert "Prune the unquantised model first, then quantise the result." in refusal(model)


def test_dynamically_quantised_layers_are_refused(tiny_llama):
    model = torch.ao.quantization.quantize_dynamic(tiny_llama(), {nn.Linear})
    told = refusal(model)
    assert told.startswith("`model.layers.0.self_attn.q_proj` is quantised (Linear)")
    assert "Prune the unquantised model, then quantise it." in told


def test_eight_bit_floats_are_refused_with_a_dtype_to_load(tiny_llama):
    model = tiny_llama()
    gate = model.model.layers[0].mlp.gate_proj
    gate.weight = nn.Parameter(gate.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    told = refusal(model)
    assert "`model.layers.0.mlp.gate_proj.weight` has dtype torch.float8_e4m3fn" in told
    assert "Load the model with `dtype=torch.bfloat16`." in told


def test_sparse_weights_are_made_dense_first(tiny_llama):
    model = tiny_llama()
    up = model.model.layers[0].mlp.up_proj
    up.weight = nn.Parameter(up.weight.detach().to_sparse_csr())
    told = refusal(model)
    assert told.startswith("`model.layers.0.mlp.up_proj.weight` is sparse")
    assert "to_dense()" in told


def weight_norm(linear):
    parametrizations.weight_norm(linear)


def weight_norm_by_hooks(linear):
    nn.utils.weight_norm(linear)


def mask(linear):
    prune.l1_unstructured(linear, "weight", 0.3)


def mask_of_rows(linear):
    prune.ln_structured(linear, "weight", 0.3, n=2, dim=0)


def mask_of_no_entry(linear):
    prune.identity(linear, "weight")


def sparsity_of_torchao(linear):
    from torch.ao.pruning import WeightNormSparsifier

    WeightNormSparsifier(sparsity_level=0.5).prepare(
        nn.ModuleDict({"linear": linear}), [{"tensor_fqn": "linear.weight"}]
    )


@pytest.mark.parametrize("name", ["mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"])
@pytest.mark.parametrize(
    "change",
    [
        weight_norm,
        weight_norm_by_hooks,
        mask,
        mask_of_rows,
        mask_of_no_entry,
        sparsity_of_torchao,
    ],
)
def test_a_weight_that_is_computed_from_others_is_made_permanent_first(tiny_llama, change, name):
    model = tiny_llama()
    change(model.model.layers[1].get_submodule(name))
    told = refusal(model)
    assert told.startswith(f"`model.layers.1.{name}` has a mask or a parametrisation")
    assert "Make it permanent first, with `torch.nn.utils.prune.remove`" in told


def test_a_mask_of_a_norm_or_of_a_bias_is_refused_too(tiny_opt):
    for name in ("final_layer_norm", "fc2"):
        model = tiny_opt()
        module = model.model.decoder.layers[0].get_submodule(name)
        prune.l1_unstructured(module, "bias", 0.3)
        assert f"layers.0.{name}` has a mask" in refusal(model)


@pytest.mark.parametrize("name", ["mlp.c_fc", "mlp.c_proj"])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_parametrised_layers_that_are_no_linear_are_refused_too(tiny_model, name, part):
    model = tiny_model("gpt2")
    torch.nn.utils.parametrize.register_parametrization(
        model.transformer.h[1].get_submodule(name), part, nn.Identity()
    )
    told = refusal(model)
    assert told.startswith(f"`transformer.h.1.{name}` has a mask or a parametrisation")
    assert "remove_parametrizations`" in told


def test_masks_that_were_made_permanent_are_weights(tiny_llama, logits):
    model = tiny_llama()
    up = model.model.layers[1].mlp.up_proj
    mask(up)
    prune.remove(up, "weight")
    yopo.apply_plan(model, yopo.plan_by_criterion(model, 0.3, criterion=yopo.criteria.row_norm))
    assert (up.weight == 0).any()
    assert torch.isfinite(logits(model)).all()


class WithMask(nn.Linear):
    """As masks of one's own are kept."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.register_buffer("mask", torch.ones_like(self.weight))

    def forward(self, inputs):
        return nn.functional.linear(inputs, self.weight * self.mask)


class WithLowRank(nn.Linear):
    """As `loralib` keeps its adapters."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.lora_A = nn.Parameter(torch.ones(4, self.in_features))
        self.lora_B = nn.Parameter(torch.ones(self.out_features, 4))


@pytest.mark.parametrize(("kind", "more"), [(WithMask, "mask"), (WithLowRank, "lora_A")])
@pytest.mark.parametrize("name", ["up_proj", "down_proj"])
def test_what_a_linear_layer_holds_beside_its_weight_is_not_cut_blindly(
    tiny_llama, kind, more, name
):
    model = tiny_llama()
    mlp = model.model.layers[1].mlp
    setattr(mlp, name, kind(mlp.get_submodule(name)))
    told = refusal(model)
    assert told.startswith(f"a linear layer of `model.layers.1.mlp` holds `{more}` beside")
    assert "merge it into the weight first, or add it after pruning" in told


def offloaded_to_cpu(model, folder):
    from accelerate import cpu_offload

    return cpu_offload(model, "cpu")


def offloaded_to_disk(model, folder):
    from accelerate import disk_offload

    return disk_offload(model, folder, "cpu")


def loaded_with_a_layer_on_disk(model, folder):
    places = dict.fromkeys(
        ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    return reloaded(model, folder, device_map=places, offload_folder=str(folder / "offload"))


def reloaded(model, folder, **kwargs):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, **kwargs)


@pytest.mark.parametrize(
    "offload", [offloaded_to_cpu, offloaded_to_disk, loaded_with_a_layer_on_disk]
)
def test_offloaded_weights_are_refused_with_a_device_map(tiny_llama, tmp_path, offload):
    told = refusal(offload(tiny_llama(), tmp_path))
    assert told.startswith("some weights are offloaded to the CPU or the disk.")
    assert "`device_map='cpu'`" in told


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu", "auto"])
def test_a_device_map_that_keeps_every_weight_on_a_device_works(
    tiny_llama, tmp_path, logits, device_map
):
    model = reloaded(tiny_llama(), tmp_path, device_map=device_map)
    dense = tiny_llama()
    plan = yopo.plan_by_criterion(dense, 0.3, criterion=yopo.criteria.row_norm)
    yopo.apply_plan(dense, plan)
    yopo.apply_plan(model, plan)
    torch.testing.assert_close(logits(model), logits(dense))


def test_hooks_that_leave_the_weights_where_they_are_work(tiny_llama, logits):
    from accelerate import dispatch_model

    model = dispatch_model(tiny_llama(), {"": "cpu"}, force_hooks=True)
    yopo.apply_plan(model, yopo.plan_by_criterion(model, 0.3, criterion=yopo.criteria.row_norm))
    assert torch.isfinite(logits(model)).all()


def test_weights_that_are_missing_can_take_a_plan_but_not_make_one(tiny_llama):
    with torch.device("meta"):
        model = type(tiny_llama())(tiny_llama().config)
    for attempt in (
        lambda: yopo.PolicyPruner().fit(model),
        lambda: yopo.plan_by_criterion(model, 0.3, criterion=yopo.criteria.row_norm),
    ):
        with pytest.raises(UnsupportedModelError, match=r"`model\.layers\.0\.mlp` are on the meta"):
            attempt()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_weights_that_are_not_finite_are_refused_by_name(tiny_llama, value, name):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.get_submodule(name).weight[5, 7] = value
    for attempt in (
        lambda: yopo.PolicyPruner().fit(model),
        lambda: yopo.PolicyPruner.prunenet().fit(model),
        lambda: yopo.plan_by_criterion(model, 0.3, criterion=yopo.criteria.row_norm),
    ):
        with pytest.raises(UnsupportedModelError) as caught:
            attempt()
        assert str(caught.value) == (
            "`model.layers.1.mlp` has weights that are NaN or infinite. Mend the checkpoint, or "
            "load it in a wider `dtype`."
        )


def test_a_bias_that_is_not_finite_is_found_too(tiny_opt):
    model = tiny_opt()
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.bias[3] = torch.nan
    with pytest.raises(UnsupportedModelError, match=r"layers\.1` has weights that are NaN"):
        yopo.PolicyPruner().fit(model)


def test_an_ffn_of_no_rows_is_refused_by_name(tiny_llama):
    model = tiny_llama(intermediate_size=0)
    for attempt in (
        lambda: yopo.PolicyPruner().fit(model),
        lambda: yopo.plan_by_criterion(model, 0.3, criterion=yopo.criteria.row_norm),
    ):
        with pytest.raises(UnsupportedModelError, match=r"`model\.layers\.0\.mlp` has 0 rows"):
            attempt()


def test_a_model_without_an_ffn_says_how_to_name_one(tiny_llama):
    told = refusal(tiny_llama(num_hidden_layers=0))
    assert told.startswith("no FFN was found in LlamaForCausalLM.")
    assert "`yopo.register_adapter`" in told


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_ffns_that_share_one_matrix_are_refused_by_name(tiny_llama, name):
    model = tiny_llama()
    first, second = (layer.mlp for layer in model.model.layers)
    second.get_submodule(name).weight = first.get_submodule(name).weight
    told = refusal(model)
    assert "`model.layers.1.mlp` shares some of its matrices with `model.layers.0.mlp`" in told
    assert "Untie them first." in told


def test_weights_of_inference_mode_are_weights(tiny_llama):
    with torch.inference_mode():
        model = tiny_llama()
    plan = yopo.plan_by_criterion(model, 0.3, criterion=yopo.criteria.norm_product)
    assert plan == yopo.plan_by_criterion(tiny_llama(), 0.3, criterion=yopo.criteria.norm_product)
