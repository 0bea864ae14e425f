"""The embedded default: a small real Qwen3-VL and its world, for a machine without GPU or network.

toy/base/ is to this code what Qwen3-VL is to the paper: a checkpoint folder like any other, of a
`Qwen3VLForConditionalGeneration` (DeepStack, interleaved M-RoPE, merge size 2, tied embeddings)
with 2.6 million parameters and patches of 8 pixels. No phase knows that it is a toy.

- world.py: the scenes, the expressions that refer to their objects, the samples made of them
- questions.py: what else can be asked: views, frames of a color, marks
- model.py: tokenizer, image processor, and the model before it has learnt anything
- lessons.py: what the base learns from
- train.py: the recipe, `python -m toy.recipe.train`
- skills.py: what the base can do, `python -m toy.recipe.skills` (README.md has the table)

The base has general skills alone: it grounds expressions, finds frames of a named color, says how a
frame lies around an object, reads marks. It has never met a prompt of the methods, a sentence of a
step, or its own prediction: the `no training` rows of the toy are what they say.
"""
