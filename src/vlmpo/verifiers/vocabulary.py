"""Words for values in the languages that are read: numbers, what multiplies or counts them, colours and shapes."""

from __future__ import annotations

from vlmpo.verifiers.languages import word_set

NUMBERS = {
    word: value
    for listed in (
        "cero uno dos tres cuatro cinco seis siete ocho nueve diez - doce trece catorce quince",
        "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze",
        "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn",
        "zero um dois três quatro cinco seis sete oito nove dez onze doze treze catorze quinze",
        "ноль один два три четыре пять шесть семь восемь девять десять одиннадцать двенадцать",
        "нуль одна две - - - - - - - - - -",
        "- una duas - - - - - - - - - - - -",
        "- une - - - - - - - - - - - - -",
        "- ein - - - - - - - - - - - - -",
        "- eine - - - - - - - - - - - - -",
        "〇 一 二 三 四 五 六 七 八 九 十 十一 十二 十三 十四 十五 十六 十七 十八 十九 二十",
        "零 - 两 - - - - - - - - - - - -",
        "- 一つ 二つ 三つ 四つ 五つ 六つ 七つ 八つ 九つ",
        "- - 兩 - - - - - - - - - - - -",
    )
    for value, word in enumerate(listed.split())
    if word != "-"
}
# What multiplies the number before it.
MAGNITUDES = {
    name: value
    for value, names in [
        (10, "十"),
        (100, "百"),
        (1000, "千 mil mille tausend тысяча тысячи тысяч тыс"),
        (10**4, "万 萬"),
        (10**6, "百万 millón millones million millions millionen mio milhão milhões миллион миллиона миллионов млн"),
        (10**8, "亿 億"),
        (10**9, "milliard milliards milliarde milliarden mrd bilhão bilhões миллиард миллиарда миллиардов млрд"),
    ]
    for name in names.split()
}
# Words for things that are counted, right after the number.
COUNTERS = (
    "个|個|只|隻|条|條|本|枚|台|人|匹|つ|辆|輛|张|張|年|月|日|岁|歳|名|位|根|块|塊|颗|顆|件|头|頭|朵|棵|座|栋|支|枝|杯|把|次|回|種|种|"
    "羽|冊|杯|軒|車|票|点|個の|ヶ|コ|こ|種類|份|层|層|组|組|对|双|片|面|扇|间|間|所|家|项|項|处|颗|粒|滴|排|行|列|格|步"
)
COLOURS = {
    word: value
    for value, listed in enumerate(
        (
            "red rojo roja rouge rot rote vermelho vermelha красный красная красное 红色 红 紅色 赤 赤色",
            "blue azul bleu bleue blau blaue синий синяя синее 蓝色 蓝 藍色 青 青色",
            "green verde vert verte grün grüne зелёный зеленый зелёная зеленая 绿色 绿 綠色 緑 緑色",
            "yellow amarillo amarilla jaune gelb gelbe amarelo amarela жёлтый желтый жёлтая желтая 黄色 黄",
            "black negro negra noir noire schwarz schwarze preto preta чёрный черный чёрная 黑色 黑 黒 黒色",
            "white blanco blanca blanc blanche weiß weiss weiße branco branca белый белая 白色 白",
            "orange naranja anaranjado laranja оранжевый оранжевая 橙色 橙 オレンジ オレンジ色",
            "purple morado púrpura violet violette lila roxo roxa фиолетовый фиолетовая 紫色 紫",
            "grey gray gris grise grau graue cinza серый серая 灰色 灰",
            "brown marrón brun marron braun braune marrom коричневый коричневая 棕色 褐色 茶色",
            "pink rosa rose розовый розовая 粉色 粉红色 ピンク ピンク色",
            "circle círculo cercle kreis круг 圆形 圆 圓形 円 丸",
            "square cuadrado carré quadrat quadrado квадрат 正方形",
            "triangle triángulo dreieck triângulo треугольник 三角形",
            "rectangle rectángulo rechteck retângulo прямоугольник 长方形 矩形 長方形",
            "left izquierda gauche links esquerda слева левый 左 左边 左側",
            "right derecha droite rechts direita справа правый 右 右边 右側",
            "cat gato chat katze кошка кот 猫 貓",
            "dog perro chien hund cachorro собака 狗 犬",
        )
    )
    for word in listed.split()
}
# Words of other languages that are English words too, for something else.
HOMOGRAPHS = word_set("rose chat dos null un once rot sept die hund pan six")
# Words of languages that are not read, in Latin letters.
OTHER_LANGUAGES = word_set(
    "è il della che risposta sono het een antwoord niet zijn jest odpowiedź nie są ve bir cevap değil är och "
    "svaret inte det er svar ikke là của không đáp án jawaban adalah yang tidak on vastaus ei ja nem válasz "
    "az je odpověď scusa przepraszam özür förlåt maaf ik jag het rätt sikerült helyes xin lỗi powinno być"
) - {"ja"}
