"""The embedded default: a small real Qwen3-VL and its world, for a machine without GPU or network.

toy/base/ is to this code what Qwen3-VL is to the paper: a checkpoint folder like any other, of a
`Qwen3VLForConditionalGeneration` (DeepStack, interleaved M-RoPE, merge size 2, tied embeddings)
with 2.6 million parameters and patches of 8 pixels. No phase knows that it is a toy.

README.md says what is where, what the base can do, and how it is made.

The base has general skills alone: it grounds expressions, finds frames of a named color, says how a
frame lies around an object, reads marks. It has never met a prompt of the methods, a sentence of a
step, or its own prediction: the `no training` rows of the toy are what they say.
"""
