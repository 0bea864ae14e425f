"""Base models and adapters: loaded, saved, put to decoding; the loops beside the paper's."""
