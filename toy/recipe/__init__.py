"""What trains the toy's base; its weights are in toy/base, so nobody runs it twice."""
