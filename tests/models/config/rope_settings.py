"""Settings of rotary scaling for the tests of models."""


def llama3(factor=32.0, length=8192):
    """Llama 3.2's settings, or the same with another factor and original length."""
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": length,
    }
