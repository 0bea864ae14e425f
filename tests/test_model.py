"""Base models, adapters, checkpoints, decoding, memory: what is refused, what stays the same."""

import argparse
import copy
import json
import re
import resource
import shutil
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import common
from common import IVT, VLM, build_trajectory, encode_images, rollout, trajectory_logprobs
from support.data.samples import load_image
from support.model import adapters, checkpoints, decoding, loading, memory, plan
from support.running import errors, files
from tests.small import GOOD, TEXTS, one_line, picture, vlm  # noqa: F401  vlm is a fixture

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Cache, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer


def model_args(folder, **changes):
    """The flags that `load_vlm` reads."""
    values = dict(dtype="float32", max_pixels=2**20, quantize="none", checkpointing="off")
    return argparse.Namespace(**{**values, "model": str(folder), **changes})


def save_parts(vlm, folder):
    """A checkpoint folder of the small model."""
    vlm.base.save_pretrained(folder)
    vlm.tokenizer.save_pretrained(folder)
    vlm.image_processor.save_pretrained(folder)
    return folder


# Checkpoints --------------------------------------------------------------------------------------
class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def test_a_checkpoint_is_data_and_is_written_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints.save_checkpoint("c", update=1, finished=False, weight=torch.ones(3))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # as a full disk
    try:
        said = one_line(checkpoints.save_checkpoint, "c", update=2, weight=torch.ones(100_000))
        assert "c cannot be written (OSError: [Errno 27] File too large); what was saved" in said
        log = files.Log("log")
        with pytest.raises(SystemExit, match="log cannot be written"):
            for _ in range(3):
                log.write(text="x" * 60_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert checkpoints.load_checkpoint("c")["update"] == 1
    content = bytearray(Path("c").read_bytes())
    place = content.index(torch.ones(3).numpy().tobytes())
    content[place] ^= 1
    Path("c").write_bytes(content)
    assert "(ValueError: damaged); move it away" in one_line(checkpoints.load_checkpoint, "c")
    for other in ([1, 2], 7, None, {"a": 1}, {"update": "1", "finished": False}):
        torch.save(other, "c")
        assert "no checkpoint of this code" in one_line(checkpoints.load_checkpoint, "c")
    torch.save({"update": Evil()}, "c")
    assert "no checkpoint of this code" in one_line(checkpoints.load_checkpoint, "c")
    assert not Path("evil").exists()


def test_a_phase_takes_the_best_adapter_and_says_where_it_stopped(tmp_path, capsys):
    args = argparse.Namespace(out=tmp_path, preset="toy", model="m")
    assert checkpoints.best_adapter(tmp_path) is None
    assert "first run: python x" in one_line(adapters.weights_of, args, "sft", "python x")
    for name, finished in (("base_grpo", True), ("sft", True), ("grpo", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").touch()
        file = tmp_path / f"{name}.checkpoint"
        checkpoints.save_checkpoint(file, update=3, finished=finished)
        assert checkpoints.best_adapter(tmp_path) == tmp_path / name
        said = f"{name}: the run stopped after update 3" in capsys.readouterr().out
        assert said is not finished


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def change(name, **changes):
    """None removes a value."""

    def damage(folder):
        content = {**json.loads((folder / name).read_text()), **changes}
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / name).write_text(json.dumps(kept))

    return damage


def damaged(whole, damage):
    """A copy of a folder, with a damage done to it."""
    folder = whole.with_name("damaged")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    damage(folder)
    return folder


def test_a_damaged_checkpoint_is_refused_in_one_line(vlm, tmp_path):
    whole = save_parts(vlm, tmp_path / "whole")
    text = json.loads((whole / "config.json").read_text())["text_config"]
    weights, sizes = "model.safetensors", "preprocessor_config.json"
    template, ready = "chat_template.jinja", {"quant_method": "bitsandbytes", "load_in_4bit": True}
    own = (whole / template).read_text()
    foreign = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), unk_token="<unk>")

    taller, wider = {**text, "num_hidden_layers": 3}, {**text, "intermediate_size": 64}
    cases = [
        (remove("config.json"), "look at its config.json"),
        (write("config.json", "[]"), "look at its config.json"),
        (change("config.json", text_config=taller), r"11 weights .* no value: .*layers\.2\."),
        (change("config.json", text_config=wider), "6 weights .* another shape"),
        (cut(weights, 50_000), r"look at its config.json and \*.safetensors"),
        (remove(sizes), r"look at its \(pre\)processor_config"),
        (change(sizes, size={"shortest_edge": "a"}), r"look at its \(pre\)processor_config"),
        (change(sizes, patch_size=None), r"frames \(14, 2, 2\), in config.json \(8, 2, 2\)"),
        (change(sizes, image_mean="x"), r"look at its \(pre\)processor_config"),
        (change("generation_config.json", eos_token_id=[[1]]), "and generation_config"),
        (change("generation_config.json", eos_token_id="x"), "eos_token_id is no token"),
        (write("tokenizer.json", "{"), "look at its tokenizer.json"),
        (remove(template), f"look at its .*{template}"),
        (write(template, "{% broken"), f"look at its .*{template}"),
        (write(template, "{{ ''.__class__.__mro__ }}"), f"look at its .*{template}"),
        (write(template, "{{ messages[0].content }}"), "expected a picture"),
        (write(template, own + "<think>\n"), "no <think> .* makes .*<think>"),
        (write(template, own + own), "expected a picture and words, once"),
        (change("config.json", quantization_config=ready), "quantised already, .*--quantize none"),
        (change("config.json", quantization_config=3), "look at its config.json"),
        (change("config.json", model_type="qwen2_5_vl"), "model_type is qwen2_5_vl"),
        (foreign.save_pretrained, r"no token <\|im_end\|>; a Qwen3-VL is expected"),
    ]
    for damage, words in cases:
        folder = damaged(whole, damage)
        message = one_line(loading.load_vlm, model_args(folder))
        assert re.search(words, message) and f"--model {folder}" in message, message
    for value in ("nope", "./nope", "a/b/c"):
        message = one_line(loading.load_vlm, model_args(value))
        assert f"--model {value}: no such folder, and not a hub id" in message


def test_image_settings_may_lie_in_the_processors_file(vlm, tmp_path):
    """As transformers 5 saves them."""
    folder = save_parts(vlm, tmp_path)
    inner = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    assert loading.load_vlm(model_args(folder)).image_processor.patch_size == 8
    (folder / "processor_config.json").unlink()
    older = {key: value for key, value in inner.items() if key != "size"}
    older |= {"min_pixels": 32**2, "max_pixels": 64**2}  # of Qwen2-VL's time
    (folder / "preprocessor_config.json").write_text(json.dumps(older))
    size = loading.load_vlm(model_args(folder)).image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (32**2, 2**20)


def test_another_model_is_refused_before_its_weights_are_fetched(monkeypatch):
    """A hub id: only its config is asked for."""
    other = loading.AutoConfig.for_model("qwen2_5_vl")
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", lambda name, **options: other)
    message = one_line(loading.load_vlm, model_args("Qwen/Qwen2.5-VL-3B-Instruct"))
    assert "its model_type is qwen2_5_vl; a qwen3_vl is expected" in message


def test_weights_in_4_bits_are_taken_as_what_they_are(monkeypatch):
    config = loading.AutoConfig.for_model("qwen3_vl")
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", lambda name, **options: config)
    for kind, quantize in (("nf4", "none"), ("fp4", "nf4"), (None, "nf4"), ("nf4", "nf4")):
        ready = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": kind}
        config.quantization_config = ready
        if kind != quantize:
            assert "quantised already" in one_line(loading.check_kind, "a/b", quantize)
    loading.check_kind("a/b", "nf4")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_stop_with_the_samples_words(vlm, temperature):
    """Token 0, again and again, would be taken for an answer."""
    spoilt = copy.deepcopy(vlm.model)
    spoilt.lm_head.weight = torch.nn.Parameter(vlm.model.lm_head.weight.clone())  # not tied here
    [token] = vlm.encode(" circle")  # of one prompt alone
    spoilt.model.language_model.embed_tokens.weight.data[token] = float("nan")
    one = VLM(spoilt, vlm.tokenizer, vlm.image_processor)
    asked = [picture(32, 32)] * 2, ["the square", "the circle"], 0
    options = dict(max_tokens=3, temperatures=(temperature,) * 2, seeds=[1, 2], group_size=2)
    assert "no numbers for 'the circle'" in one_line(decoding.play, one, *asked, **options)


def test_a_checkpoint_with_tensors_of_another_shape_is_refused(vlm, tmp_path):
    one = VLM(copy.deepcopy(vlm.model), vlm.tokenizer, vlm.image_processor)
    adapters.new_adapter(one, 4, 8)
    own = adapters.adapter_state(one.model, one.model.active_adapter)
    optimizer = torch.optim.AdamW([p for p in one.model.parameters() if p.requires_grad])
    sum(p.sum() for p in optimizer.param_groups[0]["params"]).backward()
    optimizer.step()
    good = dict(adapter=own, optimizer=optimizer.state_dict(), logged=[], update=1, finished=False)
    other = copy.deepcopy(good)
    other["optimizer"]["state"][0]["exp_avg"] = torch.zeros(7)
    for name, state in ("good", good), ("other", other):
        checkpoints.save_checkpoint(tmp_path / name, **state)
    args = dict(model=one.model, optimizer=optimizer)
    assert checkpoints.load_checkpoint(tmp_path / "good", **args)["update"] == 1
    said = one_line(checkpoints.load_checkpoint, tmp_path / "other", **args)
    assert "shapes of the optimizer" in said


def test_a_foreign_or_damaged_adapter_is_refused_in_one_line(vlm, tmp_path):
    def plain():
        return VLM(copy.deepcopy(vlm.model), vlm.tokenizer, vlm.image_processor)

    trained = plain()
    adapters.new_adapter(trained, 4, 8)
    whole = tmp_path / "whole"
    adapters.save_adapter(trained, whole)
    config, tensors = "adapter_config.json", "adapter_model.safetensors"
    weights = load_file(whole / tensors)
    first = sorted(weights)[0]
    fewer = {key: value for key, value in weights.items() if key != first}
    cases = [
        (change(config, peft_type="IA3"), "cannot be loaded"),
        (change(config, r=8), "size mismatch"),
        (change(config, target_modules=r".*\.q_proj"), f"one of {config} and {tensors} speaks of"),
        (lambda folder: save_file(fewer, folder / tensors), f"speaks of {first}"),
        (cut(tensors, 20_000), "cannot be loaded"),
        (remove(config), "cannot be loaded"),
        (remove(tensors), "cannot be loaded"),
        (change("base.json", layers=9), "was trained on another base model"),
    ]
    for damage, words in cases:
        folder = damaged(whole, damage)
        beside = plain()
        adapters.new_adapter(beside, 4, 8, "other")
        for one in (plain(), beside):
            message = one_line(adapters.add_adapter, one, folder, "policy")
            assert words in message and str(folder) in message, message
    one = plain()
    adapters.add_adapter(one, whole, "sft")
    adapters.add_adapter(one, tmp_path / "none", "sft")  # it is there, and is not read again
    assert one.model.active_adapter == "sft"
    one.base.model.language_model.norm.weight.data.mul_(2)
    assert "another base model" in one_line(adapters.add_adapter, one, whole, "policy")


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_merged_base_is_another_base(vlm, tmp_path, quantize):
    """Or LoRA would count twice."""
    base, merged = save_parts(vlm, tmp_path / "base"), save_parts(vlm, tmp_path / "merged")
    one = loading.load_vlm(model_args(base, quantize=quantize))
    adapters.new_adapter(one, 4, 8)
    adapters.save_adapter(one, tmp_path / "sft")
    whole = loading.load_vlm(model_args(base))
    adapters.add_adapter(whole, tmp_path / "sft", "policy")  # trained in 4 bits, used in full
    for name, p in whole.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.01)
    whole.model.merge_and_unload().save_pretrained(merged, max_shard_size="200KB")
    (merged / "model.safetensors").unlink()
    again = loading.load_vlm(model_args(merged, quantize=quantize))
    assert "another base" in one_line(adapters.add_adapter, again, tmp_path / "sft", "policy")
    change("base.json", projection=None)(tmp_path / "sft")  # as it was written before
    adapters.add_adapter(again, tmp_path / "sft", "policy")


def add_two_adapters(one):
    """Of which the last is active, and neither leaves the model as it is."""
    for name in ("reference", "policy"):
        adapters.new_adapter(one, 4, 8, name)
    for name, p in one.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)


def test_lora_is_part_of_the_weights_for_a_while(vlm, tmp_path):
    folder = save_parts(vlm, tmp_path)
    one = loading.load_vlm(model_args(folder))
    add_two_adapters(one)

    def weights():
        return {k: p.detach().clone() for k, p in one.model.named_parameters() if "base_layer" in k}

    asked = [picture(32, 32)], ["x"], 1
    before = weights()
    for adapter in ("policy", "reference"):
        one.model.set_adapter(adapter)
        beside = rollout(one, *asked, max_tokens=9)[0]
        with pytest.raises(ZeroDivisionError), decoding.merged(one):
            changed = [not torch.equal(before[key], weight) for key, weight in weights().items()]
            assert all(changed) and len(changed) == 2 * 7
            within = rollout(one, *asked, max_tokens=9)[0]
            raise ZeroDivisionError
        assert within.target == beside.target
        assert within.logprob == pytest.approx(beside.logprob, abs=1e-4)
        after = weights()
        assert all(torch.equal(before[key], after[key]) for key in before)
        again = rollout(one, *asked, max_tokens=9)[0]
        assert again.logprob == beside.logprob  # LoRA is beside the weights again
    with one.model.disable_adapter(), decoding.merged(one):  # the model before SFT, as a critic
        assert all(torch.equal(before[key], weight) for key, weight in weights().items())
    one.model.to(torch.bfloat16)
    before = weights()
    with decoding.merged(one):
        assert all(torch.equal(before[key], weight) for key, weight in weights().items())


def test_4_bit_weights_are_unpacked_for_a_while(vlm, tmp_path, monkeypatch, capsys):
    save_parts(vlm, tmp_path)
    one = loading.load_vlm(model_args(tmp_path, quantize="nf4"))
    asked = [picture(32, 32)], ["x"], 1

    def same_as_packed():
        packed = rollout(one, *asked, max_tokens=9)[0]
        with pytest.raises(ZeroDivisionError), decoding.unpacked(one):
            within = rollout(one, *asked, max_tokens=9)[0]
            raise ZeroDivisionError
        assert within.target == packed.target
        assert within.logprob == pytest.approx(packed.logprob, abs=1e-4)
        assert rollout(one, *asked, max_tokens=9)[0].logprob == packed.logprob
        assert not any("forward" in vars(module) for module in one.model.modules())
        return packed.logprob

    found = [same_as_packed()]
    add_two_adapters(one)
    for adapter in ("policy", "reference"):
        one.model.set_adapter(adapter)
        found.append(same_as_packed())
    with one.model.disable_adapter(), decoding.unpacked(one):
        assert rollout(one, *asked, max_tokens=9)[0].logprob == found[0]
    assert found[0] != found[1] != found[2]
    layer = one.base.model.language_model.layers[0].self_attn.q_proj
    layer.lora_dropout["reference"] = torch.nn.Dropout(0.5)  # PEFT's own business
    with decoding.unpacked(one):
        changed = ["forward" in vars(m) for m in one.model.modules() if isinstance(m, LoraLayer)]
        assert "forward" not in vars(layer) and sum(changed) == len(changed) - 1
    layer.lora_dropout["reference"] = torch.nn.Identity()

    as_it_is, tries, held = decoding.rollout, [], []
    projection = one.base.model.language_model.layers[0].mlp.up_proj

    def little_room(vlm, images, *args, **options):
        tries.append((len(images), "forward" in vars(projection)))
        assert not any(tensor() is not None for tensor in held)  # free before the next try
        if tries[-1] not in ((1, False), (2, False)):
            cache = torch.zeros(10)
            held.append(weakref.ref(cache))
            raise torch.OutOfMemoryError
        return as_it_is(vlm, images, *args, **options)

    monkeypatch.setattr(decoding, "rollout", little_room)
    monkeypatch.setattr(decoding, "limit", float("inf"))
    rows = decoding.play(one, [picture(32, 32)] * 4, list("xyzw"), 1, max_tokens=9)
    assert tries == [(4, True), (1, True), *[(1, False)] * 4]  # half, a part for each
    assert len(rows) == 4 and rows[0].logprob == pytest.approx(found[2], abs=1e-4)
    assert "out of memory with 4 trajectories at once" in capsys.readouterr().out
    count = len(tries)
    decoding.play(one, [picture(32, 32)] * 2, list("xy"), 1, max_tokens=9)
    assert (4, True) not in tries[count:] and not any(copies for _, copies in tries[count:])

    def no_room_at_all(*args, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(decoding, "rollout", no_room_at_all)
    with pytest.raises(torch.OutOfMemoryError):  # one, and packed
        decoding.play(one, *asked, max_tokens=2)


def test_a_rollout_does_not_depend_on_how_it_is_cut(vlm, monkeypatch, capsys):
    images = [picture(96, 80), picture(48, 144, 1), picture(64, 64, 2)]
    asked = images, ["a", "a dog", "x"], 1
    options = dict(max_tokens=12, group_size=2)
    *_, shown, each = plan.rollout_bytes(vlm, *asked, **options)
    options |= dict(seeds=[3, 1, 2], temperatures=(1.0, 0.7))
    whole = decoding.play(vlm, *asked, **options)
    assert capsys.readouterr().out == ""  # a flag says how many
    sizes, as_it_is = [], decoding.rollout

    def counted(vlm, images, *args, **options):
        sizes.append(len(images))
        return as_it_is(vlm, images, *args, **options)

    monkeypatch.setattr(decoding, "rollout", counted)
    monkeypatch.setattr(decoding, "told", set())
    for fit, expected in ((3.01, [3]), (2.99, [2, 1]), (0.1, [1, 1, 1])):  # a memory of given size
        free = 3 * shown + fit * each
        monkeypatch.setattr(plan, "free_bytes", lambda: free - sum(sizes) * shown)
        sizes.clear()
        rows = decoding.play(vlm, *asked, planned=True, **options)
        assert sizes == expected
        assert [row.target for row in rows] == [row.target for row in whole]
        for row, other in zip(rows, whole):
            assert row.logprob == pytest.approx(other.logprob, abs=1e-4)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("rollout: 6 trajectories x ")


def test_a_flag_that_is_given_wins():
    for given, planned in ((0, True), (3, False)):
        for flags in (dict(batch_size=given), dict(batch_size=1, prompts_at_once=given)):
            args = argparse.Namespace(engine="plain", **flags)
            assert decoding.rollouts(args).keywords["planned"] == planned


def test_parts_are_equal():
    found = [plan.at_once(48, 10, free) for free in (1000, 470, 239, 70, 5, -5)]
    assert found == [48, 24, 16, 7, 1, 1]


def test_weights_are_unpacked_where_the_passes_are_at_most_doubled():
    # Without copies 8 groups go in 1, 2, 3, 3, 4 parts; with them in 1, 4, 8, or they do not fit
    found = [plan.groups_at_once(8, 10, free, 25) for free in (105, 45, 39, 34, 20)]
    assert found == [(8, True), (2, True), (3, False), (3, False), (2, False)]
    assert plan.groups_at_once(8, 10, 45, 0) == (4, False)  # no 4-bit weights


def test_what_a_gpu_has_left(monkeypatch):
    gib = 2**30
    for name, value in dict(
        is_available=True,
        mem_get_info=(9 * gib, 80 * gib),
        memory_allocated=5 * gib,
        memory_reserved=7 * gib,
    ).items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for share, expected in ((1.0, 11), (0.2, 11), (0.1, 3)):  # 9 + 2 in PyTorch's own, or its share
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: share)
        assert plan.free_bytes() == pytest.approx(0.8 * expected * gib)


def storages(tree):
    """The memory of all tensors of a nested structure, by its address."""
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return {leaf.untyped_storage()._cdata: leaf.untyped_storage() for leaf in leaves}


class Tensors(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside, at most."""

    def __init__(self):
        super().__init__()
        self.held, self.peak = {}, 0  # bytes at each address

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = storages((args, kwargs))
        made = function(*args, **(kwargs or {}))
        for address, storage in storages(made).items():
            if address not in given and address not in self.held:
                self.held[address] = storage.nbytes()
                weakref.finalize(storage, self.held.pop, address)
        self.peak = max(self.peak, sum(self.held.values()))
        return made


def peak_bytes(work):
    with Tensors() as seen:
        work()
    return seen.peak


SHAPES = [
    (torch.float32, {}),  # the toy's
    (torch.bfloat16, dict(num_hidden_layers=5, intermediate_size=640)),
    (torch.bfloat16, dict(hidden_size=256, num_attention_heads=8, num_key_value_heads=4)),
]


def test_a_cache_with_room_holds_what_torch_cat_does():
    roomy, plain = decoding.RoomyLayer(), DynamicLayer()
    for k in (5, 1, plan.SPARE, 1, 2):
        new = torch.randn(2, 3, k, 4), torch.randn(2, 3, k, 4)
        before = roomy.keys
        kept = None if before is None else before.clone()
        for held, expected in zip(roomy.update(*new), plain.update(*new)):
            assert torch.equal(held, expected)
        if kept is not None:  # what is shown of it before is not written over
            assert torch.equal(before, kept)
    for layer in (roomy, plain):  # a group shares its prompt, then each row goes on by itself
        layer.batch_repeat_interleave(2)
    new = torch.randn(4, 3, 1, 4)
    for held, expected in zip(roomy.update(new, new), plain.update(new, new)):
        assert torch.equal(held, expected)


@pytest.mark.parametrize("dtype, shape", SHAPES)
def test_the_plan_reckons_what_the_loop_makes(vlm, dtype, shape, monkeypatch):
    """A trajectory's tokens and its cache as they are, peaks within 5 percent."""
    config = copy.deepcopy(vlm.base.config)
    for name, value in shape.items():
        setattr(config.text_config, name, value)
    config.text_config.layer_types = ["full_attention"] * config.text_config.num_hidden_layers
    config.vision_config.out_hidden_size = config.text_config.hidden_size
    config = type(config).from_dict(config.to_dict())
    model = type(vlm.base)(config).to(dtype).requires_grad_(False)
    model.generation_config = vlm.base.generation_config
    enable = getattr(model, "activation_checkpointing_enable", None)  # as in `load_vlm`
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    one = VLM(model, vlm.tokenizer, vlm.image_processor, True)
    adapters.new_adapter(one, 8, 16)
    monkeypatch.setattr(VLM, "turn_ends", set())  # all steps are as long as they may be
    loop = replace(IVT, without_box="", ends=lambda text, t: False)
    caches, rows = [], []

    def new_cache():
        caches.append(Cache(None, decoding.RoomyLayer))
        return caches[-1]

    def play():
        lora = one.model.disable_adapter() if dtype == torch.float32 else nullcontext()
        with lora:  # float32 weights take it in
            options = dict(max_tokens=tokens, group_size=group, loop=loop, new_cache=new_cache)
            rows[:] = rollout(one, images, ["x"] * len(images), steps, **options)

    # Prompts, trajectories of each, T, tokens of a step, pixels: the peak is while T is fed, while
    # a prompt is; while a step is written; while the pictures of T are encoded, while a prompt's is
    cases = [(1, 8, 2, 20, 64), (4, 1, 0, 5, 64)]
    if dtype == torch.float32:
        cases += [(1, 8, 0, 200, 32)]
    else:  # float32 pixels would be NumPy's, which nobody counts
        cases += [(3, 2, 2, 5, 160), (4, 1, 0, 5, 160)]
    for prompts, group, steps, tokens, side in cases:
        images = [picture(side, side, i) for i in range(prompts)]
        asked = dict(max_tokens=tokens, group_size=group)
        length, cache, shown, each = plan.rollout_bytes(one, images[:1], ["x"], steps, **asked)
        found = peak_bytes(play)
        assert prompts * (shown + each) == pytest.approx(found, rel=0.05), (prompts, group, steps)
        assert len(rows[0].ids) == length
        keys = caches[-1].layers[0].keys
        held = 2 * len(caches[-1].layers) * keys.nbytes / len(keys)
        assert held == cache * (length - 1) / length  # the last token is never fed

    def train():
        (-trajectory_logprobs(one, rows)[0].mean()).backward()

    long = one.tokenizer.decode(one.encode(" the")[:1] * 60)
    images = encode_images(one, [picture(160, 160)] * 3)
    rows = [build_trajectory(one, images, "x", [long] * 3, loop)] * 2
    tokens = 2 * len(rows[0].ids)
    for one.checkpointing in (True, False):
        train()  # gradients are there
        found = peak_bytes(train)
        assert plan.training_bytes(one, tokens) == pytest.approx(found, rel=0.05)


def test_lora_gradients_through_4_bit_weights(vlm, tmp_path):
    """NF4 with gradient checkpointing, as the paper preset loads it, after decoding, against the
    same weights in float32."""
    import bitsandbytes as bnb

    save_parts(vlm, tmp_path)
    quantized = loading.load_vlm(model_args(tmp_path, quantize="nf4", checkpointing="on"))
    plain = loading.load_vlm(model_args(tmp_path))
    language = plain.base.model.language_model
    for name, module in quantized.base.model.language_model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = module.weight
            exact = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            language.get_submodule(name).weight.data.copy_(exact)
    down = quantized.base.model.language_model.layers[1].mlp.down_proj
    assert isinstance(down, bnb.nn.Linear4bit)

    gradients = []
    for one in (quantized, plain):
        torch.manual_seed(0)
        adapters.new_adapter(one, 4, 8)
        rollout(one, [picture(32, 32)], ["x"], 1, max_tokens=4)
        images = encode_images(one, [picture(32, 32)] * 2)
        trajectory = build_trajectory(one, images, "it", TEXTS, IVT)
        trajectory_logprobs(one, [trajectory])[0].mean().backward()
        named = one.model.named_parameters()
        gradients.append({name: p.grad for name, p in named if "lora_B" in name})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 2 * 7
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 1e-4, name
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-2, atol=1e-4), name


def test_the_probe_takes_what_is_largest_after_the_reduction(vlm, tmp_path, monkeypatch, capsys):
    """The second is larger in pixels; reduced to --max-pixels, the first is."""
    sizes = {"square": (128, 128), "long": (512, 64), "small": (32, 32)}
    made = {}
    for name, (width, height) in sizes.items():
        picture(width, height).save(tmp_path / f"{name}.png")
        made[name] = dict(GOOD, id=name, image=f"{name}.png", width=width, height=height)
    monkeypatch.setattr(
        vlm.image_processor, "size", {"shortest_edge": 256, "longest_edge": 128 * 128}
    )
    for sample in made.values():
        images = encode_images(vlm, [load_image(sample, tmp_path)])
        assert plan.image_token_count(vlm, sample) == images[0].rows * images[0].columns
    weight = vlm.base.model.language_model.norm.weight.requires_grad_(True)
    probed = []

    def examples(rows):
        probed.extend(row["id"] for row in rows)
        pictures = [load_image(made[row["id"]], tmp_path) for row in rows]
        images = encode_images(vlm, pictures)
        return [build_trajectory(vlm, [image], "it", TEXTS[:1], IVT) for image in images]

    rows = [dict(sample, traces="x" * number) for number, sample in enumerate(made.values())]
    args = argparse.Namespace(steps=2, max_tokens=7, batch_size=3, grad_accum=4, group_size=6)
    memory.try_largest(vlm, rows, examples, args)
    assert probed == ["square"] * 3 and weight.grad is None
    rows[2]["boxes"] = [GOOD["bbox"]] * 99  # so many pictures
    memory.try_largest(vlm, rows, examples, args)
    assert probed[3:] == ["small"] * 3
    del rows[2]["boxes"]
    assert re.search(r"forward and backward, 3 x \d+ tokens", capsys.readouterr().out)
    args.batch_size, args.val_prompts, args.engine, args.prompts_at_once = 2, 8, "plain", 0
    monkeypatch.setattr(decoding, "told", set())
    memory.try_largest_rollout(vlm, rows, args, tmp_path, IVT)
    weight.requires_grad_(False)
    printed = capsys.readouterr().out
    count = int(re.search(r"2 x (\d+) tokens", printed)[1])
    planned = re.findall(r"rollout: (\d+) trajectories x (\d+) tokens", printed)
    assert planned == [("8", str(count)), ("24", str(count))]  # of validations, of an update
    assert count > 3 * (64 + 7)
    assert errors.at_work == rows[:1]
    image = encode_images(vlm, [load_image(rows[0], tmp_path)])
    each = plan.training_bytes(vlm, count)
    for fit, expected in ((99, 24), (8.01, 8), (7.99, 6), (0, 1)):  # of 4 prompts' 6 trajectories
        args.batch_size = 0
        weight.requires_grad_(True)
        # Pictures of 4 prompts and of 24 trajectories' two steps, a gradient and two moments
        free = (4 + 24 * 2) * memory.size_of(image) + 3 * weight.nbytes + fit * each
        monkeypatch.setattr(plan, "free_bytes", lambda: free)
        memory.try_largest_rollout(vlm, rows, args, tmp_path, IVT)
        weight.requires_grad_(False)
        assert args.batch_size == expected


def test_an_update_without_memory_is_halved(vlm, capsys):
    """And its gradients are what half as many at a time give."""
    weight = vlm.base.model.language_model.norm.weight.requires_grad_(True)
    image = encode_images(vlm, [picture(32, 32)])
    batch = [build_trajectory(vlm, image, text, TEXTS[:1], IVT) for text in "abcdefgh"]
    tried = []

    def accumulate(size, batch, fit):
        tried.append(size)
        for i in range(0, len(batch), size):
            trajectory_logprobs(vlm, batch[i : i + size]).logprob.sum().backward()
            if size > fit:
                raise torch.OutOfMemoryError
        return "done"

    def gradient(size, fit):
        tried.clear()
        args = argparse.Namespace(batch_size=size)
        assert memory.fitting(vlm, args, accumulate, batch, fit) == "done"
        assert args.batch_size == tried[-1]  # from here on
        found = weight.grad
        weight.grad = None
        return found

    plain = gradient(2, 2)
    assert capsys.readouterr().out == ""
    assert torch.equal(gradient(11, 2), plain) and tried == [11, 5, 2]
    assert "out of memory: --batch-size 2 instead" in capsys.readouterr().out
    with pytest.raises(torch.OutOfMemoryError):
        gradient(1, 0)
    weight.requires_grad_(False).grad = None
