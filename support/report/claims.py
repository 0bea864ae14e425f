"""What a trace says of the box that it examines, and what the geometry says: one of CLAIMS.

It reads the template's sentences (support/data/teacher.py), and how a VLM words the same.
"""

import re

from common import answer_of, iou
from support.data.teacher import faults_of

WRONG, SHIFT, KEEP = CLAIMS = ("wrong object", "shift or resize", "keep")

# The template's sentences, and how a VLM words the same. The first that is found counts: what a
# trace does ("I keep it") before what it grants ("it covers the dog well, but is too wide").
DENIED = r"\b(?:not|nor|neither)\s+(?:on (?:the|a) (?:wrong|different) \w+|shifted|too \w+)"

SAYS = (
    (
        WRONG,
        r"\b(?:wrong|different|incorrect|another) (?:\w+ )?(?:object|target|item|one|person|man|"
        r"woman|child|animal|place|location|region|area)\b"
        r"|\b(?:misses|not on|not around|does not touch) the (?:\w+ )?(?:target|object)\b",
    ),
    (
        KEEP,
        r"\bI keep\b|\bkeep it\b|\bnearly right\b"
        r"|\bno (?:\w+ )?(?:correction|change|adjustment|shift)s?\b",
    ),
    (
        SHIFT,
        r"\btoo \w+|\b(?:shift|mov|offset|enlarg|expand|extend|shrink|reduc|tighten|adjust|misalign"
        r"|cuts? off)|\b(?:make it|be) (?:\w+ )?(?:larg|small|wid|narrow|tall|short|low|high)er\b",
    ),
    (
        KEEP,
        r"\bfits?\b|\bis (?:right|accurate|correct|precise)\b|\b(?:accurate|correct|precise)ly\b",
    ),
)


def trace_of(text):
    """The reasoning in what is written at a step, without its tags and the answer."""
    trace = text.removesuffix(answer_of(text))
    return trace.replace("<think>", "").replace("</think>", "").strip()


def claim_of(trace):
    """What a trace says of the box that it examines: one of CLAIMS, or None where it says none."""
    trace = re.sub(DENIED, "", trace, flags=re.I)
    return next((claim for claim, words in SAYS if re.search(words, trace, re.I)), None)


def geometry_of(box, truth):
    """What a true trace would say of a box (all in 0..1000): of CLAIMS, by the template's rules."""
    if iou(box, truth) == 0:
        return WRONG
    return SHIFT if faults_of(box, truth)[0] else KEEP
