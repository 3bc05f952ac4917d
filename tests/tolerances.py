"""Every bound on a floating-point error that the tests allow, and the only place for one.

Each bound has a test that breaks it by scaling one input by 1.1. Integer and packing tests need no entry: they are
exact. The metrics are functions here so that a bound never drifts from what it bounds.
"""

import torch


def rms_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of `expected`; infinite where `got` is not finite."""
    if not bool(got.isfinite().all()):
        return float("inf")
    difference = got.double() - expected.double()
    return float(difference.square().mean().sqrt() / expected.double().square().mean().sqrt())


# One rounding to the output dtype, at worst: half a unit in the last place of the significand (8 bits, 11 bits).
_ROUNDED = {torch.bfloat16: 2.0**-8 + 1e-5, torch.float16: 2.0**-11 + 1e-5}

# int8_scaled_mm: the sum is exact, so only the epilogue rounds: three float32 operations, then the output dtype.
INT8_SCALED_MM = {torch.float32: 2e-7, **_ROUNDED}

# INT8 linear of random numbers against bfloat16, relative root mean square. Measured: 0.008 to 0.011; with scales
# x 1.1: more than 0.1.
INT8_AGAINST_BF16 = 0.03

# grouped_mm INT8 against float64. Beside the above: float32 noise flips a rounding of the intermediate now and then,
# which moves one of its codes by one.
INT8_MOE = {torch.float32: 1e-3, torch.bfloat16: 5e-3}
# The same on a GPU, where gate and up are stored in bfloat16 before they are multiplied and quantized: that moves one
# code in a hundred by one. Computed for intermediates of 176 and 704: 0.007 and 0.009.
INT8_MOE_STORED = 0.015

# Stored losses of the small checkpoints (nats a token, float32): another processor sums in another order.
SMALL_MODEL_LOSS = 2e-4

# Quark W8A8 INT8 in vLLM on a CPU against BF16 there, small checkpoints: (greatest mean KLD in nats, least share of
# positions with the same most likely token). Measured: dense 0.0008 and 0.979, MoE 0.0011 and 0.994; half the rows of
# one attention output scaled by 1.5: 0.0061 and 0.0122.
QUARK_INT8_DIVERGENCE = {"dense": (0.002, 0.96), "moe": (0.003, 0.97)}

# gemma4q quantize against AMD Quark on the same checkpoint: greatest relative difference of a scale, and share of
# codes that may be one apart (more is never allowed). Measured on x86-64: 0 and 0.
QUARK_SCALE = 1e-5
QUARK_CODES_DIFFERING = 1e-3

# Weighted error of a tensor from 256 of its 4096 rows against all of them, rows differing as real ones do (log-normal,
# sigma 0.5 in amplitude): root mean square and mean of the relative deviation over 24 draws. Measured: 0.099 and
# -0.004; with sensitivities that differ too, and rows drawn by them, 0.075 and 0.009.
SAMPLED_ERROR_RMS = 0.12
SAMPLED_ERROR_MEAN = 0.05
# The error of IQ4_XS over that of Q4_K, from 16 rows against 4096. Measured: 0.032; other draws 0.019 to 0.029.
SLOW_TYPE_ERROR = 0.05
# The same sums by another route: float32 products, summed in another order.
WEIGHTED_ERROR = 1e-5

# Errors of types on normally distributed weights, which the package keeps to three digits: against 256 other rows of
# 1024, and against a measured table of two tensors of 0.4 and 0.5 million weights. Measured: 0.011 and 0.015.
PRIOR_ERROR = 0.02
PRIOR_ERROR_OF_A_MODEL = 0.02

# A model against its own base file, in nats: the file holds 16 bits a log-probability. Measured on the small dense
# model: mean 0.000000, at most 0.000040; with one ffn_gate scaled by 1.1: 0.000024 and 0.000201.
SELF_KLD_MEAN = 5e-6
SELF_KLD_MAX = 1e-4

# Perplexity of the small dense model, bfloat16 in vLLM over float32 in llama-perplexity, less 1. Measured: -0.0009;
# both in float32 0.00002.
PERPLEXITY_BESIDE_LLAMA_CPP = 5e-3

# Loss (nats a token) of the pruned small mixture in llama.cpp against transformers with masked routers, float32; caches
# of llama.cpp are float16. Measured: 0.00009; with six expert scales of one layer x 1.1: 0.0008; unpruned: 0.21.
PRUNED_LOSS = 3e-4

# Gemma 3 padded from 640 to 768 channels against itself, float32 logits: every operation rounds a little differently.
# Measured: 9e-7.
PADDED_LOGITS = 5e-6

# Squared gradients of 1500 drawn sequences of labels against their expectation, greatest deviation over the mean.
# Measured with the test's seed: 0.043 (others to 0.18, rare labels being rare); with a linear scaled by 1.1: 0.38.
FISHER_OF_DRAWN_LABELS = 0.1

# Divergence of storing one tensor of a small model as Q4_0: predicted against measured, over all tensors: (least rank
# correlation, greatest factor between the totals). Measured: dense 0.991 and 1.004; MoE 0.921 and 0.47, since no
# gradient sees that a small error may send a token to other experts. Shifted by three tensors: 0.19 and 0.03.
FISHER_PREDICTION = (0.9, 2.5)

# fp8_scaled_mm against float64: products are exact, sums are float32 in another order, then the output dtype.
FP8_SCALED_MM = {torch.float32: 2e-6, **_ROUNDED}
# Its experts: float32 noise flips a rounding of the intermediate now and then, which moves it by up to an eighth.
FP8_MOE = {torch.float32: 2e-3, torch.bfloat16: 6e-3}

# FP8 scales from a histogram of eight bins an octave, against the values that were counted: relative deviation of a
# percentile and of the squared error of rounding. Measured: 0.0046 and 0.052; values times 1.1: 0.095 and 0.26.
FP8_HISTOGRAM_PERCENTILE = 0.01
FP8_HISTOGRAM_ERROR = 0.1

# Streamed calibration against hooks on the whole model in transformers, float32: relative deviation of sums, and share
# of values in another bin of the histogram. Measured: 4e-7 and 7e-5; with one matrix of the layer before scaled by 1.1,
# more than ten times the bounds.
CALIBRATION = 3e-6
CALIBRATION_HISTOGRAM = 4e-4

# An imatrix from a streamed calibration against llama-imatrix on the same tokens, both float32: relative deviation of
# weights. Measured: dense 0.0002, MoE 0.0004; half the sums times 1.1: 0.07.
CALIBRATED_IMATRIX = 1e-3

# FP8 static in vLLM on a CPU against BF16 there, small checkpoints: (greatest mean KLD in nats, least share of
# positions with the same most likely token). Measured: dense 0.0041 and 0.962, MoE 0.0069 and 0.953; half the input
# scales divided by 8, so that inputs saturate: 0.21 and 0.18; half the gates' weight scales times 4: 0.016 and 0.082.
# Input scales times 8 change nothing: E4M3 is floating-point.
FP8_DIVERGENCE = {"dense": (0.01, 0.92), "moe": (0.013, 0.91)}
# Both in float32, mean KLD in nats: the engine against the format's definition, and two ranks against one. Measured:
# 0.00012 and, for ranks, 0.00004 (dense), 0.000005 (MoE); 0.0021 where the definition does not round inputs.
FP8_DEFINITION = 5e-4
FP8_RANKS = 2e-4

# Marginals of the streamed backward pass against the whole model's, float32, same labels. Measured: 1e-6.
CALIBRATED_FISHER = 1e-5

# A pruned checkpoint against the unpruned one with the same experts masked in its routers, transformers, float32, root
# mean square of log-probabilities: only the order of sums differs. Measured: 1.2e-7; one expert of one layer another:
# 0.05. A factor of 2 on mlp.down_proj, which the norm behind it takes out but for its epsilon: 1.2e-7; on that norm:
# 0.08.
PRUNED_LOGPROBS = 1e-6
# Routers with dropped rows added to others, bfloat16, against float32. Measured: 0.0017, one rounding; with a share of
# 0.33 for 0.3: 0.013.
TRANSFERRED_ROUTER = 2.0**-8

# Pruned MoE, three counts, float32: greatest difference of a log-probability, in nats, between vLLM (alone, compiled,
# over two ranks), or streamed layers, and the unpruned model with its routers masked, in transformers. Measured: 2e-5;
# with two kept experts of one layer swapped: 4.3 and more.
MASKED_LOGPROBS = 2e-4
# Quantized by our commands against BF16, both pruned so, in vLLM on a CPU: (greatest mean KLD in nats, least share of
# positions with the same most likely token). Measured: INT8 0.0010 and 0.978, over ranks 0.0011 and 0.977; FP8 0.0065
# and 0.956; half the rows of experts' down_proj scaled by 1.5: 0.022 and 0.913; half the gates' weight scales times 4:
# 0.10 and 0.817.
PRUNED_QUANTIZED = {"int8": (0.003, 0.96), "fp8": (0.013, 0.91)}

# fused_quantize against the unfused reference: relative deviation of scales, and share of codes that may be one apart
# (more is never allowed). Measured in Triton's interpreter: 2.4e-6 (one gate of -1.6 alone in its row; else 2e-7) and
# 0.00007. The reference adds 1 to tanh, and so loses digits of rows whose gates are all negative.
FUSED_SCALE = 1e-5
FUSED_CODES_DIFFERING = 1e-3
# Its residual behind a norm: float32 noise, which may flip the one rounding of float16. Else exact.
FUSED_RESIDUAL = {torch.float32: 2e-7, torch.float16: 5e-5}

# Scores of experts against their formulas spelled out, float64 in another order; and from weights, sums of an expert's
# weights in float32. Measured: 0 and 4e-8; with one score of one layer x 1.1: 0.0008 and more.
RECIPES_BY_HAND = 1e-12
WEIGHT_SCORES = 1e-6

# Candidates judged layer by layer against the whole model in transformers with its routers masked, float32: relative
# root mean square of divergences, and of layers' errors. Measured: 3e-7, with knobs and float32 weights 6e-7; with one
# expert of one layer another: more than 0.01.
JUDGED = 5e-6

# Ridge regression in float32 (sums) and float64 (solution) against singular values in float64. Measured: 1.1e-6; with
# a ridge of 0.11 for 0.1: 0.0036 and more.
RIDGE_REGRESSION = 1e-5
# Divergences of a refitted prune, judged layer by layer, against those of the checkpoint written from it in
# transformers, float32: relative root mean square. Measured: 8e-7; of the same prune without a refit: 1.4.
REFIT_KLD = 5e-6

# exl3 against its equation in float64: a dense weight, and a product of float32 sums; then the output dtype. Measured
# in float32: 6e-8 and 4e-7; with one bit of the trellis flipped: 0.0007 and more.
EXL3_DENSE = {torch.float32: 5e-7, **_ROUNDED}
EXL3_LINEAR = {torch.float32: 2e-6, **_ROUNDED}
# The same in Triton, where activations have 22 bits. Measured in its interpreter: 6e-8; matrix instructions of GPUs may
# truncate sums where that rounds, some 1e-6. With one bit of the trellis flipped, or one sign: 0.0007 and more.
EXL3_TRITON = {torch.float32: 1e-5, **_ROUNDED}

# Memory in GiB against published tables: a cell of the EXL3 card, measured 0.007 at most, with a tenth of a bit more
# in the body 0.33 and more; and half of the last printed digit.
VRAM_CELL = 0.02
VRAM_DIGIT = 0.0051

# EXL3 encoding of normally distributed numbers: relative squared error by bits. At 3 and 4 bits 5% above the published
# figures of an exact search, .0179 and .0048; else 5% above ours on 256 tiles, the worst codebook.
EXL3_GAUSSIAN = {2.0: 0.0724, 3.0: 0.0188, 4.0: 0.00504, 5.0: 0.0013, 6.0: 0.000341, 7.0: 9.15e-5, 8.0: 2.53e-5}
# Squared error of a tile by two searches in float32: they may take another path where two cost the same. Measured: 0.
EXL3_SAME_COST = 1e-5
# Squared error of closed rings over that of paths with free ends. Measured: 1.04 at 3 bits, 1.02 at 8; closed anywhere:
# 1.12 and more.
EXL3_CLOSED_RING = 1.08
# float32 products and factors of up to 1300 rows beside float64, over the norm of the whole. Measured: 3e-7.
EXL3_ORDERED = 1e-5
# Errors that quantize_linear reports, float32 products and float64 sums, against float64. Measured: 1e-7.
EXL3_REPORTED = 1e-5
# Error of outputs with feedback over that without, three bits, eight inputs to a direction. Measured: 0.11; with
# the second moments of other inputs: 1.4.
EXL3_FEEDBACK = 0.25
# The factor L of second moments, and feedback by it, float32 against float64. Measured: 6e-6.
EXL3_FACTOR = 2e-5
# Deviation from 1 of blocks of 128 x 128 behind scales and rotation. Measured: 0.01; with blocks that are partly
# padding left as they are: 0.4.
EXL3_BLOCK_DEVIATION = 0.05
# Error of a weight times a power of two, over its own: scales are rounded to float16 elsewhere. Measured: 0.019.
EXL3_SCALED = 0.05

# EXL3 in vLLM, random weights, against the dense weights that they mean: greatest difference of a log-probability, in
# nats; in float32, alone, over two ranks and compiled, and in bfloat16. Measured: 1e-5, and 0.10; with half the input
# signs of some experts times 1.1: 0.86.
EXL3_SERVED = 2e-4
EXL3_SERVED_BF16 = 0.3

# What `gemma4q doctor` calls right and wrong, in real engines: mean KLD in nats of one text from the checkpoint that it
# was made from. Right ones stay below, silently wrong ones above.
DOCTOR_RIGHT = 0.1

# `gemma4q report`: relative squared errors of weights dequantized in float32 against float64, relative. Measured: 3e-7;
# with a scale times 1.1 an error becomes a hundred times as large.
REPORTED_ERROR = 1e-5

# Log-probabilities of the small models by `evaluation.engines.transformers` against the whole model, float32, greatest
# difference in nats. Measured: 0; with logits times 1.1: 2.6.
ENGINE_ROWS = 1e-4
# Mean KLD in nats of the small dense model in BF16 from itself in float32, by transformers: between. Measured: 0.0003.
NOISE_FLOOR = (1e-4, 1e-3)
# The same in float32 by vLLM and by transformers, dense and MoE. Measured: 4e-8; with logits times 1.1: 0.01.
ENGINES_IN_FLOAT32 = 1e-6
# Figures of `gemma4q evaluate` over those that llama-perplexity prints of the same files, less 1. Measured: at
# most 0.0004, the median; with the other's log-probabilities times 1.1: 0.9.
LLAMA_CPP_PARITY = 5e-3
