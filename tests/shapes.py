"""Parameter shapes of real models."""


def llama(layers, hidden, feed_forward, key_value, vocabulary):
    """A LLaMA model: embedding, then per layer q, k, v, o, gate, up, down and two norms, then norm and head."""
    layer = [(hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden), (feed_forward, hidden)]
    layer += [(feed_forward, hidden), (hidden, feed_forward), (hidden,), (hidden,)]
    return [(vocabulary, hidden), *layer * layers, (hidden,), (vocabulary, hidden)]


def gpt2(layers=12, width=768, vocabulary=50257, context=1024):
    """GPT-2 with tied embeddings: 124M parameters by default."""
    layer = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    layer += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), (context, width), *layer * layers, (width,), (width,)]
