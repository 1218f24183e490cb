"""The choice of weight and density without training or merging again (`mm4ke sweep`)."""
