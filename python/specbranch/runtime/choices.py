"""What can be chosen by name when a pair is loaded. Imports nothing, so that `specbranch --help` is quick."""

DTYPES = ("auto", "bfloat16", "float16", "float32")  # of weights; auto: as the checkpoint stores them
PRIORITIES = ("target", "draft", "none")  # the model whose work goes first where both share a GPU
ROUNDS = "rounds.safetensors"  # what a predictor was trained on, in its directory
WEIGHTS = ("auto", "keep", "lossless")  # how a loaded checkpoint's weights are kept
ARITHMETICS = ("exact", "fast")  # of products over a GGUF file's blocks: over their values, or activations in 8 bits
ARITHMETIC_OF = {"target": "exact", "draft": "fast"}  # where none is chosen
