"""Convolutions into attention and back: one layer, or a network at a time; exactly, where heads sit on places."""

from glocal.conversion.attention import ConvolutionAsAttention as ConvolutionAsAttention
from glocal.conversion.attention import to_attention as to_attention
from glocal.conversion.convolution import to_convolution as to_convolution
from glocal.conversion.table import Conversion as Conversion
from glocal.conversion.table import ConvertedLayer as ConvertedLayer
from glocal.conversion.table import compare_conversion as compare_conversion
