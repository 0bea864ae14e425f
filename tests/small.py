"""What the tests share: a very small Qwen3-VL, a picture, two texts of a trajectory, a sample."""

from common import VLM, format_box, trajectory_logprobs
from support.model.loading import quiet
from toy.model import BASE, make_model

import pytest
import torch
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

TEXTS = [
    "<think>I look for it.</think>\n" + format_box([1, 2, 30, 40]),
    "<think>The red box is too low.</think>\n" + format_box([5, 6, 70, 800]),
]
GOOD = dict(
    id="1", source="s", image="a.png", width=20, height=10, expression="x", bbox=[0, 0, 5, 5]
)
SPANS = st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True).map(sorted)
ANY_BOX = st.builds(lambda x, y: [x[0], y[0], x[1], y[1]], SPANS, SPANS)
TURNED = Image.Exif()
TURNED[0x0112] = 6  # as a camera marks a photo taken upright: a viewer turns it


@pytest.fixture(scope="module")
def vlm():
    """Random weights: it writes nonsense, and never the same twice in a row."""
    quiet()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = make_model(layers=2, vision_layers=3).requires_grad_(False)
    for merger in model.model.visual.deepstack_merger_list:  # the toy's begin at zero
        merger.linear_fc2.weight.normal_(0, 0.08)
    language = model.model.language_model  # as the toy begins its training, it would repeat a word
    language.embed_tokens.weight.normal_(0, 0.08)
    # Some steps end early.
    language.embed_tokens.weight[tokenizer.convert_tokens_to_ids("<|im_end|>")] *= 4
    language.norm.weight.fill_(1.0)
    processor = Qwen2VLImageProcessorPil.from_pretrained(BASE)
    processor.size = {"shortest_edge": 16**2, "longest_edge": 2**20}  # small pictures stay so
    return VLM(model, tokenizer, processor)


def picture(width, height, seed=0):
    """Noise (PIL, RGB)."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 255, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def sampler_gap(vlm, rows):
    """The largest between the log-probabilities of a rollout and those of one pass over it."""
    sampled = torch.tensor([logprob for row in rows for logprob in row.logprob])
    return (trajectory_logprobs(vlm, rows).logprob - sampled).abs().max()


def one_line(call, *arguments, **options):
    """The message with which a call ends the program."""
    with pytest.raises(SystemExit) as ended:
        call(*arguments, **options)
    message = str(ended.value)
    assert message.startswith("error: ") and "\n" not in message, message
    return message
