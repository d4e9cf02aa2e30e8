"""What the lesson says, in English and in Chinese, and what can be chosen in it."""

from collections.abc import Mapping, Sequence

# Controls and their values; what has a word of its own is shown by it.
CHOICES: Mapping[str, Sequence[str]] = {
    "picture": ("ball", "digit", "texture"),
    "kernel": ("sharpen", "blur", "edge", "shift", "random"),
    "size": ("1", "2", "3", "5"),
    "border": ("zeros", "replicate", "reflect", "circular", "none"),
    "stride": ("1", "2"),
    "dilation": ("1", "2"),
}

_ENGLISH = {
    "name": "English",
    "language": "Language",
    "noscript": "This page computes what it shows and needs a browser that runs its script.",
    "title": "A convolution, written as attention",
    "lead": "A convolution looks through a small window. Attention looks at the whole picture. Still, attention "
    "can do exactly what a convolution does: give it one head for each cell of the window. Below, both compute the "
    "same picture.",
    "how": "The pixel that is being computed is called the query; it has an orange frame. Press Play and watch, or "
    "press and drag on a picture. With the keyboard: choose a picture and use the arrow keys.",
    # controls
    "picture": "Picture",
    "picture-ball": "ball",
    "picture-digit": "digit",
    "picture-texture": "texture",
    "kernel": "Kernel",
    "kernel-sharpen": "sharpen",
    "kernel-blur": "blur",
    "kernel-edge": "find edges",
    "kernel-shift": "shift",
    "kernel-random": "random",
    "size": "Window",
    "size-1": "1 × 1",
    "size-2": "2 × 2",
    "size-3": "3 × 3",
    "size-5": "5 × 5",
    "border": "Border",
    "border-zeros": "zeros",
    "border-replicate": "replicate",
    "border-reflect": "reflect",
    "border-circular": "circular",
    "border-none": "none for heads",
    "stride": "Stride",
    "dilation": "Dilation",
    "play": "Play",
    "pause": "Pause",
    "all": "Fill in all",
    "another": "Another kernel",
    "query": "Query",
    "difference": "difference",
    "place": "row {row}, column {column}",
    "alpha": "Sharpness",
    "try": "Try:",
    "try-exact": "Make it exact",
    "try-soft": "Soften the heads",
    "try-edgeless": "Take the border away",
    "try-apart": "Move one head",
    "said-exact": "Exact. Every head attends to one pixel, and together they read the window. What differs, if "
    "anything, is rounding.",
    "said-near": "Nearly exact. Each head gives a little to the neighbours of its pixel: exp(−α) of what its pixel "
    "gets.",
    "said-soft": "Not exact. The heads are so soft that each one reads a mean over many pixels. Raise α and watch "
    "the difference fall.",
    "said-none": "Wrong at the border. Heads there find no place outside, but their weights must sum to 1. So they "
    "take the nearest pixels inside. In the middle nothing changes.",
    "said-both": "Wrong at the border, where heads find no place outside and take the nearest pixels inside. And not "
    "exact in the middle: there the heads are too soft, or one has left its cell.",
    "said-moved": "A head has left its cell. Between pixels it reads a mean of those around it, which no single cell "
    "of a kernel can do. The sharper it is, the more the nearest pixel counts.",
    # left
    "convolution": "Convolution",
    "window-label": "Picture with the kernel’s window. Arrow keys move the query.",
    "window-caption": "The window around the query. Blue weights add, red ones subtract.",
    "convolved-label": "Output of the convolution, as far as it is computed.",
    "range": "The output so far. Black is {low}, white {high}.",
    "taps-label": "Cells of the kernel. Arrow keys choose one.",
    "taps-caption": "The pixels in the window, and what each is multiplied by.",
    "tap": "Cell ({down}, {right})",
    "tap-reads": "its pixel",
    "nothing": "outside: reads nothing",
    "times": "times its weight",
    "weight": "weight",
    "tap-all": "sum over all cells",
    # right
    "attention": "Attention with {heads} heads",
    "attention-one": "Attention with 1 head",
    "look-label": "Picture with what all heads attend to, weighted. Arrow keys move the query.",
    "look-caption": "What all heads together read. Each ring is a head’s centre: drag it.",
    "attended-label": "Output of attention, as far as it is computed.",
    "heads-label": "Attention maps of the heads. Arrow keys choose one.",
    "heads-caption": "Where each head looks, each on its own scale, and what it is multiplied by. Press one to "
    "choose it.",
    "head": "Head {head}, centre ({down}, {right})",
    "head-reads": "the mean it reads",
    "head-most": "share of its strongest place",
    "head-all": "sum over all heads",
    "down": "centre, down",
    "right": "centre, right",
    "restore": "All heads back to their cells",
    # difference
    "same": "Is it the same?",
    "map-label": "Map of the differences between the two outputs.",
    "map-caption": "Where the outputs differ.",
    "error": "Largest |attention − convolution|",
    "gradient": "Largest gradient of a centre",
    "gradient-note": "How much an output pixel changes when a centre moves, per pixel of its way.",
    "price-label": "Chart of the difference and of the gradient against α, both on logarithmic scales.",
    "price-alpha": "sharpness α",
    "price-error": "difference",
    "price-gradient": "gradient of a centre",
    "price": "Exactness has a price. With every head on its cell, and places beyond the border, the difference falls "
    "as the heads get sharper; but the gradient of their centres falls like exp(−α), too. Training follows "
    "gradients. A head that is exact can no longer be moved by training; a softer one can still learn where to look.",
    # why
    "why": "Why it works",
    "step-score": "Every head scores every pixel. δ is where the pixel lies, seen from the query; Δ is the head’s "
    "centre. The score falls with the squared distance between them. What the pixels show does not matter.",
    "step-softmax": "The softmax turns scores into weights that sum to 1. The larger α, the more goes to the pixel "
    "at the centre; its neighbours get exp(−α) of that. Here is the chosen head from left to right. Line: exp(score). "
    "Bars: softmax along the row. A pixel’s weight is this share times its share from top to bottom.",
    "bell-label": "Shares of the chosen head from left to right, as bars.",
    "offset": "δ₂, pixels to the right of the query",
    "step-heads": "One head stands on each cell of the window. What head h reads, the mean of pixels x with "
    "weights a, is multiplied by the kernel’s weight w of its cell. The sum over the heads is the convolution.",
    "step-encoding": "How can attention learn such scores? Score a pixel by the product of two short vectors: r "
    "for the position, v for the head.",
    "step-constant": "The product is −α‖δ − Δ‖² + α‖Δ‖². The last term is the same for all pixels, so the softmax "
    "cancels it. The paper calls this the quadratic encoding.",
    "borders": "What happens at the border",
    "borders-why": "Attention weights always sum to 1: a head cannot look at nothing. So the picture is extended "
    "by the places that the window reaches. A head that looks there finds nothing (zeros), or a copy of a pixel "
    "(replicate, reflect, circular), as the convolution does.",
    "borders-none": "With “none for heads” there are no such places. The convolution on the left still reads zeros "
    "outside; the heads on the right cannot, and their border is wrong.",
    "cost": "What it costs",
    "cost-attention": "Attention",
    "cost-heads": "heads",
    "cost-weights": "weights of the kernel",
    "cost-centres": "coordinates of centres",
    "cost-alphas": "sharpness α",
    "cost-wide": "parameters with 64 channels in and out, and a bias",
    "cost-reads": "pixels weighed for each output pixel",
    "cost-note": "Three numbers more for each head is little. But attention weighs all pixels for each output "
    "pixel, where a convolution reads its window only. In return, its heads are free to look elsewhere. Here all "
    "heads share one α; in a layer each has its own.",
    "source": "After Cordonnier, Loukas and Jaggi: On the Relationship between Self-Attention and Convolutional "
    "Layers, ICLR 2020, arXiv 1911.03584. All numbers are computed in this page, in double precision, while you "
    "change it.",
    "spoken": "Row {row}, column {column}: convolution {convolution}, attention {attention}. Alpha {alpha}: "
    "largest difference {error}, largest gradient of a centre {gradient}.",
}  # fmt: skip

_CHINESE = {
    "name": "中文",
    "language": "语言",
    "noscript": "本页的内容由脚本当场计算，需要浏览器运行脚本。",
    "title": "用注意力写出卷积",
    "lead": "卷积通过一个小窗口看图像，注意力看整幅图像。但注意力能做得与卷积完全一样：窗口有几个格子，"
    "就给它几个头。下面两边计算的是同一幅图像。",
    "how": "正在计算的像素称为查询，用橙色框标出。按“播放”观看，或者在图像上按住拖动。也可用键盘：选中一幅图像，"
    "再按方向键。",
    "picture": "图像",
    "picture-ball": "球",
    "picture-digit": "数字",
    "picture-texture": "纹理",
    "kernel": "卷积核",
    "kernel-sharpen": "锐化",
    "kernel-blur": "模糊",
    "kernel-edge": "边缘",
    "kernel-shift": "平移",
    "kernel-random": "随机",
    "size": "窗口",
    "size-1": "1 × 1",
    "size-2": "2 × 2",
    "size-3": "3 × 3",
    "size-5": "5 × 5",
    "border": "边界",
    "border-zeros": "补零",
    "border-replicate": "复制边缘",
    "border-reflect": "镜像",
    "border-circular": "循环",
    "border-none": "头没有边界",
    "stride": "步幅",
    "dilation": "膨胀",
    "play": "播放",
    "pause": "暂停",
    "all": "全部填入",
    "another": "换一个核",
    "query": "查询",
    "difference": "差别",
    "place": "第 {row} 行，第 {column} 列",
    "alpha": "锐度",
    "try": "试一试：",
    "try-exact": "变得精确",
    "try-soft": "让头变软",
    "try-edgeless": "去掉边界",
    "try-apart": "移动一个头",
    "said-exact": "精确相等。每个头只注意一个像素，合起来正好读完窗口。即使还有差别，也只是舍入误差。",
    "said-near": "几乎相等。每个头还分一点权重给邻近的像素：约为中心像素的 exp(−α)。",
    "said-soft": "不相等。头太软，每个头读到的是许多像素的平均值。调大 α，看差别如何变小。",
    "said-none": "边界处出错。那里的头在图像外找不到位置，而权重之和必须为 1，于是只好取图像内最近的像素。"
    "图像中间不受影响。",
    "said-both": "边界处出错：那里的头在图像外找不到位置，只好取图像内最近的像素。图像中间也不精确：头太软，"
    "或者有一个头离开了自己的格子。",
    "said-moved": "有一个头离开了自己的格子。停在像素之间时，它读的是中心周围像素的平均值，"
    "这是卷积核的单个格子做不到的。头越锐利，这个平均值越接近离中心最近的像素。",
    "convolution": "卷积",
    "window-label": "图像与卷积核的窗口。方向键移动查询。",
    "window-caption": "查询周围的窗口。蓝色为加，红色为减。",
    "convolved-label": "卷积的输出，已计算的部分。",
    "range": "已算出的输出。黑色是 {low}，白色是 {high}。",
    "taps-label": "卷积核的格子。方向键选择一个。",
    "taps-caption": "窗口中的像素，以及各自所乘的权重。",
    "tap": "格子 ({down}, {right})",
    "tap-reads": "它的像素",
    "nothing": "在图像外：什么也不读",
    "times": "乘以权重",
    "weight": "权重",
    "tap-all": "所有格子之和",
    "attention": "{heads} 个头的注意力",
    "attention-one": "1 个头的注意力",
    "look-label": "图像与所有头加权后的注意力。方向键移动查询。",
    "look-caption": "所有头合起来读什么。每个圆圈是一个头的中心，可以拖动。",
    "attended-label": "注意力的输出，已计算的部分。",
    "heads-label": "各个头的注意力图。方向键选择一个。",
    "heads-caption": "每个头看哪里（各用自己的色阶），以及所乘的权重。按一下选择。",
    "head": "第 {head} 个头，中心 ({down}, {right})",
    "head-reads": "它读到的平均值",
    "head-most": "最强的位置所占",
    "head-all": "所有头之和",
    "down": "中心，向下",
    "right": "中心，向右",
    "restore": "所有头回到自己的格子",
    "same": "两边相同吗？",
    "map-label": "两个输出之差的分布图。",
    "map-caption": "输出在哪里不同。",
    "error": "|注意力 − 卷积| 的最大值",
    "gradient": "中心的最大梯度",
    "gradient-note": "中心每移动一个像素，输出像素改变多少。",
    "price-label": "差别和梯度随 α 变化的图，两轴均为对数刻度。",
    "price-alpha": "锐度 α",
    "price-error": "差别",
    "price-gradient": "中心的梯度",
    "price": "精确是有代价的。当每个头都在自己的格子上、边界外也有位置时，头越锐利，差别越小；但中心的梯度也像 "
    "exp(−α) 一样下降。训练靠的是梯度：精确的头，训练已经移不动了；软一些的头，还能学会该看哪里。",
    "why": "为什么可以",
    "step-score": "每个头给每个像素打分。δ 是从查询看去像素所在的位置，Δ 是头的中心。两者距离的平方越大，分数越低。"
    "像素的内容不起作用。",
    "step-softmax": "softmax 把分数变成权重，权重之和为 1。α 越大，中心处的像素得到的越多；它的邻居只得到其中的 "
    "exp(−α)。下面是所选的头从左到右的情形：线是 exp(score)，条是沿这一行的 softmax。"
    "一个像素的权重，是这个份额乘以它从上到下的份额。",
    "bell-label": "所选的头从左到右的份额，用条形表示。",
    "offset": "δ₂：在查询右边多少个像素",
    "step-heads": "窗口的每个格子上站着一个头。第 h 个头读到的是像素 x 以 a 为权重的平均值，再乘以该格子的核权重 "
    "w。对所有头求和，就是卷积。",
    "step-encoding": "注意力怎样学到这样的分数？用两个短向量的乘积打分：r 属于位置，v 属于头。",
    "step-constant": "乘积等于 −α‖δ − Δ‖² + α‖Δ‖²。最后一项对所有像素都相同，"
    "因此在 softmax 中抵消。论文称之为二次编码。",
    "borders": "边界处发生什么",
    "borders-why": "注意力的权重之和总是 1，头不能什么都不看。所以要把图像向外扩展，直到窗口够得着的位置。"
    "看向那里的头，要么读到空（补零），要么读到某个像素的副本（复制边缘、镜像、循环），与卷积一样。",
    "borders-none": "选“头没有边界”时，就没有这些位置。左边的卷积在图像外仍读到零；右边的头做不到，于是边界出错。",
    "cost": "代价是多少",
    "cost-attention": "注意力",
    "cost-heads": "头的个数",
    "cost-weights": "核的权重",
    "cost-centres": "中心的坐标",
    "cost-alphas": "锐度 α",
    "cost-wide": "输入输出各 64 通道并有偏置时的参数",
    "cost-reads": "每个输出像素要称量的像素",
    "cost-note": "每个头只多三个数。但注意力为每个输出像素称量所有像素，而卷积只读窗口。换来的是，"
    "头可以自由地看向别处。这里所有的头共用一个 α；在真正的层里，每个头各有一个。",
    "source": "参考 Cordonnier、Loukas 和 Jaggi：On the Relationship between Self-Attention and Convolutional "
    "Layers，ICLR 2020，arXiv 1911.03584。所有数字都在您操作时由本页以双精度计算。",
    "spoken": "第 {row} 行，第 {column} 列：卷积 {convolution}，注意力 {attention}。α 为 {alpha}：最大差别 "
    "{error}，中心的最大梯度 {gradient}。",
}  # fmt: skip

WORDS: Mapping[str, Mapping[str, str]] = {"en": _ENGLISH, "zh": _CHINESE}
