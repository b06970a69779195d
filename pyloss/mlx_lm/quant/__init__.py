"""mlx_lm.quant, none of whose modules is here: any import of them says so."""

raise ImportError(
    "mlx_lm.quant is not in pyloss: `pyloss quantize` quantizes, and --tune trains the scales; "
    "docs/coming_from_mlx.md lists what is here"
)
