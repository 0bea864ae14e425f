"""The embedded default: a small real Qwen3-VL, its world, and how it was made (toy/README.md)."""
