"""placeholder until the paper forms are written"""


class ProdQuantizer: ...


class PolarQuantizer: ...
