"""The texts of the page that draws images, in Chinese; a browser that prefers Chinese shows them. No imports."""

ZH_CN = {
    "## Draw images\nChoose a model, classes and settings, then press Draw.": "## 生成图像\n"
    "选好模型、类别和参数，然后点击“生成”。",
    "Model": "模型",
    "Classes": "类别",
    "Type to search": "输入文字可搜索",
    "Images per class": "每类张数",
    "Sampler": "采样器",
    "Steps": "步数",
    "Guidance": "引导强度",
    "1: none. More: clearer, but more alike; burnt, if it is too much": "1 表示不引导；越大越符合类别，"
    "多样性也越低；过大会导致颜色过饱和",
    "Guided from": "引导起点",
    "Guided until": "引导终点",
    "time; 0: noise": "时间；0 为噪声",
    "time; 1: image": "时间；1 为图像",
    "Internal guidance": "内部引导强度",
    "1: none": "1 表示不引导",
    "Seed": "随机种子",
    "Random": "随机",
    "Show the steps on the way": "显示中间步骤",
    "Draw": "生成",
    "Cancel": "取消",
    "Grid": "网格图",
    "Single images": "单张图",
    "On the way": "中间步骤",
    "What the latents decode to after so many steps, on the way from noise.": "采样过程中各步 latent 解码后的图像，"
    "列标题为步数。",
    "Grid as PNG": "下载网格图（PNG）",
    "Settings as JSON": "下载参数（JSON）",
    "The same in a terminal": "等价的命令行",
}
