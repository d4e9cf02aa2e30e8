"""The token mixers, one file each. A new operator is one line here."""

from glocal.mixers.average_pooling import AveragePooling as AveragePooling
from glocal.mixers.class_attention import ClassAttention as ClassAttention
from glocal.mixers.convolution import Convolution as Convolution
from glocal.mixers.cross_attention import CrossAttention as CrossAttention
from glocal.mixers.deformable_conv import DeformableConv as DeformableConv
from glocal.mixers.depthwise_conv import DepthwiseConv as DepthwiseConv
from glocal.mixers.dynamic_conv import DynamicConv as DynamicConv
from glocal.mixers.dynamic_depthwise_conv import DynamicDepthwiseConv as DynamicDepthwiseConv
from glocal.mixers.focal_attention import FocalAttention as FocalAttention
from glocal.mixers.gate import Gate as Gate
from glocal.mixers.gated_mixture import GatedMixture as GatedMixture
from glocal.mixers.gated_padded_attention import GatedPaddedAttention as GatedPaddedAttention
from glocal.mixers.gated_positional_attention import GatedPositionalAttention as GatedPositionalAttention
from glocal.mixers.generalized_quadratic_attention import GeneralizedQuadraticAttention as GeneralizedQuadraticAttention
from glocal.mixers.gru import GRU as GRU
from glocal.mixers.halo_attention import HaloAttention as HaloAttention
from glocal.mixers.inhomogeneous_depthwise_conv import InhomogeneousDepthwiseConv as InhomogeneousDepthwiseConv
from glocal.mixers.involution import Involution as Involution
from glocal.mixers.large_kernel_conv import LargeKernelConv as LargeKernelConv
from glocal.mixers.learned_relative_attention import LearnedRelativeAttention as LearnedRelativeAttention
from glocal.mixers.lightweight_conv import LightweightConv as LightweightConv
from glocal.mixers.linear_attention import LinearAttention as LinearAttention
from glocal.mixers.linear_spatial_reduction_attention import (
    LinearSpatialReductionAttention as LinearSpatialReductionAttention,
)
from glocal.mixers.linear_token_mixing import LinearTokenMixing as LinearTokenMixing
from glocal.mixers.local_mlp import LocalMLP as LocalMLP
from glocal.mixers.locally_enhanced_attention import LocallyEnhancedAttention as LocallyEnhancedAttention
from glocal.mixers.lstm import LSTM as LSTM
from glocal.mixers.max_pooling import MaxPooling as MaxPooling
from glocal.mixers.multi_scale_attention import MultiScaleAttention as MultiScaleAttention
from glocal.mixers.multi_scale_conv import MultiScaleConv as MultiScaleConv
from glocal.mixers.neighborhood_attention import NeighborhoodAttention as NeighborhoodAttention
from glocal.mixers.outlook_attention import OutlookAttention as OutlookAttention
from glocal.mixers.padded_learned_attention import PaddedLearnedAttention as PaddedLearnedAttention
from glocal.mixers.padded_quadratic_attention import PaddedQuadraticAttention as PaddedQuadraticAttention
from glocal.mixers.quadratic_attention import QuadraticAttention as QuadraticAttention
from glocal.mixers.relative_attention import RelativeAttention as RelativeAttention
from glocal.mixers.relative_position_attention import RelativePositionAttention as RelativePositionAttention
from glocal.mixers.released_focal_attention import ReleasedFocalAttention as ReleasedFocalAttention
from glocal.mixers.rotary_attention import RotaryAttention as RotaryAttention
from glocal.mixers.self_attention import SelfAttention as SelfAttention
from glocal.mixers.spatial_reduction_attention import SpatialReductionAttention as SpatialReductionAttention
from glocal.mixers.token_mlp import TokenMLP as TokenMLP
from glocal.mixers.window_attention import WindowAttention as WindowAttention
