"""The embedded default: a small real Qwen3-VL and its world, for a machine without GPU or network.

toy/base/ is to this code what Qwen3-VL is to the paper: a checkpoint folder like any other, of a
`Qwen3VLForConditionalGeneration` (DeepStack, interleaved M-RoPE, merge size 2, tied embeddings)
with two million parameters and patches of 8 pixels. No phase knows that it is a toy.

- world.py: the scenes, the expressions that refer to their objects, the samples made of them
- model.py: tokenizer, image processor, and the model before it has learnt anything
- conversations.py: what the base learns from: chats about scenes, with coloured frames in them
- train.py: the recipe, `python -m toy.train`

The base is good at single-shot grounding and used to several images in one sequence. It was never
shown its own prediction. But it was trained on the IVT prompt, with the very sentence that the
template teacher writes at step 0, and it has seen red translucent frames that look like the
overlay; so the `no training` rows of the toy are not quite untrained.
"""
