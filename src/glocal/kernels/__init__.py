"""Fast paths that are code of their own: tensors in, tensors out."""

from glocal.kernels.biased_attention import biased_attention as biased_attention
from glocal.kernels.gathered import gathered_scores as gathered_scores
from glocal.kernels.gathered import gathered_sum as gathered_sum
from glocal.kernels.local_sum import local_sum as local_sum
from glocal.kernels.neighborhood_attention import neighborhood_attention as neighborhood_attention
from glocal.kernels.separable_sum import separable_sum as separable_sum
from glocal.kernels.window_attention import window_attention as window_attention
