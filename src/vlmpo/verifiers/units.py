"""The units that quantities are read with: their kinds, and how large they are. Data, no logic."""

from __future__ import annotations

from fractions import Fraction

from vlmpo.verifiers.languages import word_set

# Name to kind and size in the kind's base unit.
UNITS: dict[str, tuple[str, Fraction]] = {
    name: (kind, Fraction(scale))
    for kind, scale, names in [
        ("length", "1/1000000000", "nm nanometer nanometers"),
        ("length", "1/1000000", "µm μm um micrometer micrometers micron microns"),
        ("length", "1/1000", "mm millimeter millimeters millimetre millimetres 毫米 мм milímetros millimètres"),
        ("length", "1/100", "cm centimeter centimeters centimetre centimetres zentimeter 厘米 公分 см сантиметров"
         " сантиметра centímetros centimètres センチ センチメートル"),
        ("length", "1/10", "dm decimeter decimeters"),
        ("length", "1", "m meter meters metre metres metros mètres 米 公尺 м метр метра метров メートル"),
        ("length", "1000", "km kilometer kilometers kilometre kilometres kilómetros quilômetros kilomètres 公里 千米 км"
         " километров キロメートル"),
        ("length", "0.0254", "inch inches"),
        ("length", "0.3048", "ft foot feet"),
        ("length", "0.9144", "yd yard yards"),
        ("length", "1609.344", "mi mile miles"),
        ("mass", "1/1000000", "mg milligram milligrams"),
        ("mass", "1/1000", "g gram grams gramos gramas grammes gramm 克 г грамм"),
        ("mass", "1", "kg kilogram kilograms kilo kilos kilogramos quilogramas kilogrammes 公斤 千克 кг キログラム"),
        ("mass", "1000", "t ton tons tonne tonnes tonnen toneladas 吨 тонн"),
        ("mass", "0.45359237", "lb lbs"),
        ("mass", "0.028349523125", "oz ounce ounces"),
        ("volume", "1/1000", "ml mL milliliter milliliters millilitre millilitres 毫升"),
        ("volume", "1", "l L liter liters litre litres litros 升 литров"),
        ("volume", "3.785411784", "gal gallon gallons"),
        ("time", "1/1000", "ms millisecond milliseconds"),
        ("time", "1", "s sec second seconds segundos secondes sekunden 秒 секунд секунды"),
        ("time", "60", "min minute minutes minutos minuten 分钟 分鐘 минут минуты"),
        ("time", "3600", "h hr hrs hour hours horas heures stunden 小时 小時 часов часа 時間"),
        ("time", "86400", "day days días dias jours tage 天 дней дня"),
        ("time", "604800", "week weeks semanas semaines wochen 周 недель"),
        ("month", "1", "month months meses mois monate 个月 месяцев ヶ月"),
        ("year", "1", "year years yr yrs años anos ans jahre лет года"),
        ("angle", "1", "° degree degrees deg grados graus degrés grad 度 градусов градуса"),
        ("radian", "1", "rad radian radians"),
        ("celsius", "1", "°c celsius"),
        ("fahrenheit", "1", "°f fahrenheit"),
        ("kelvin", "1", "kelvin kelvins"),
        ("speed", "1", "m/s"),
        ("speed", "5/18", "km/h kph kmh"),
        ("speed", "0.44704", "mph"),
        ("frequency", "1", "Hz hz hertz"),
        ("frequency", "1000", "kHz khz"),
        ("frequency", "1000000", "MHz mhz"),
        ("frequency", "1000000000", "GHz ghz"),
        ("power", "1", "W watt watts"),
        ("power", "1000", "kW kw kilowatt kilowatts"),
        ("power", "1000000", "MW megawatt megawatts"),
        ("energy", "1", "J joule joules"),
        ("energy", "1000", "kJ kj"),
        ("energy", "3600000", "kWh kwh"),
        ("calories", "1", "cal calories"),
        ("calories", "1000", "kcal"),
        ("voltage", "1", "V volt volts"),
        ("voltage", "1/1000", "mV"),
        ("current", "1", "ampere amperes amps"),
        ("current", "1/1000", "mA"),
        ("resistance", "1", "Ω ohm ohms"),
        ("force", "1", "N newton newtons"),
        ("pressure", "1", "Pa pascal pascals"),
        ("pressure", "1000", "kPa kpa"),
        ("bytes", "1", "bytes byte"),
        ("bytes", "1000", "kB KB"),
        ("bytes", "1000000", "MB"),
        ("bytes", "1000000000", "GB"),
        ("amount", "1", "mol moles"),
        ("pixels", "1", "px pixel pixels"),
        ("length^2", "10000", "ha hectare hectares"),
        ("length^2", "4046.8564224", "acre acres"),
        ("USD", "1", "$ usd us$ dollar dollars dólares dollar 美元 долларов ドル"),
        ("USD", "1/100", "cent cents"),
        ("EUR", "1", "€ eur euro euros 欧元 евро ユーロ"),
        ("GBP", "1", "£ gbp pound pounds"),
        ("JPY", "1", "jpy yen 日元 円"),
        ("CNY", "1", "cny rmb yuan 元 人民币"),
        ("yen or yuan", "1", "¥"),
        ("INR", "1", "₹ inr rupee rupees"),
        ("BRL", "1", "r$ brl reais"),
        ("RUB", "1", "₽ rub рублей рубля руб"),
    ]
    for name in names.split()
}  # fmt: skip
# Kinds of which one cannot be told from the other by their numbers.
UNLIKE = [
    {"celsius", "fahrenheit", "kelvin", "angle"},
    {"angle", "radian"},
    {"time", "month", "year"},
    {"JPY", "CNY", "yen or yuan"},
    {"calories", "energy"},
]
PERCENT = word_set("% percent pct percentage prozent процент процента процентов パーセント pourcent")
