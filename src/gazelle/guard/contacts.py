"""Ways to reach a person or a machine: e-mail, telephone and IP addresses.

Telephone numbers are judged by phonenumbers, Google's tables of numbering plans.
"""

import ipaddress
import re
from collections.abc import Iterator
from functools import lru_cache

from gazelle.base.optional import require
from gazelle.guard.detector import DIGITS, Candidate, Detector, Span, Words, named

_RESERVED = re.compile(r"(?:^|\.)(?:example(?:\.(?:com|org|net|edu))?|test|invalid|localhost|local|internal)$")
_FILES = {"png", "jpg", "jpeg", "gif", "svg", "webp", "js", "ts", "css", "py", "rs", "go", "java", "so", "dll", "json",
          "yaml", "yml", "xml", "html", "txt", "md", "pdf", "zip", "gz", "service", "timer", "socket", "sh"}
_AT = r"(?: ?@ ?| ?[\[({<] ?(?:at|@) ?[\])}>] ?| at | ?艾特 ?| ?\(a\) ?|#)"
_DOT = r"(?:\.| \. | ?[\[({<] ?(?:dot|\.|点) ?[\])}>] ?| dot | ?点 ?)"
_TLD = r"(?:com|org|net|edu|gov|io|co|cn|de|fr|uk|ru|jp|me|info|app|dev|eu|it|es|br|in|au|ca|ch|nl|hk|tw)"
_PLAIN = r"[A-Za-z0-9][A-Za-z0-9._%+'\-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?\.){1,6}[A-Za-z]{2,24}"
# Written around: "ann (at) mail (dot) com". The plain words "at" and "dot" count only together.
_AROUND = (rf"(?i)\b([A-Z0-9][A-Z0-9_%+\-]{{0,20}}(?:{_DOT}[A-Z0-9_%+\-]{{1,16}}){{0,1}})({_AT})"
           rf"([A-Z0-9\-]{{1,20}}(?:{_DOT}[A-Z0-9\-]{{1,12}}){{0,1}}?)({_DOT})({_TLD})\b")


def _email(candidate: Candidate) -> Iterator[tuple[str, Span]]:
    local, _, domain = candidate.found.rpartition("@")
    after = candidate.text[candidate.end:candidate.end + 1]
    scheme = candidate.text[max(0, candidate.start - 3):candidate.start] == "://"
    if ((after.isascii() and after.isalnum()) or _RESERVED.search(domain.lower()) or ".." in local or scheme
            or domain.rpartition(".")[2].lower() in _FILES or (local == "git" and after == ":")
            or (candidate.text[max(0, candidate.start - 1):candidate.start] == ":"
            and "://" in candidate.text[max(0, candidate.start - 80):candidate.start].rpartition(" ")[2])):
        return
    yield "email", (candidate.start, candidate.end, 1.0)


_PROVIDERS = {"qq", "gmail", "163", "126", "sina", "foxmail", "outlook", "hotmail", "yahoo", "sohu", "139", "189",
              "aliyun"}
_COMMON = {"the", "a", "an", "this", "that", "these", "those", "my", "your", "our", "his", "her", "their", "its",
           "work", "home", "all", "any", "some", "every", "each", "one", "least", "most", "once", "noon", "night",
           "school", "no"}


def _written_around(candidate: Candidate) -> Iterator[tuple[str, Span]]:
    at, dot = (candidate.match.group(number) or "" for number in (2, 4))
    domain = re.sub(r"[^a-z0-9]+", ".", re.sub(r"\bdot\b|点", ".", (candidate.match.group(3) or "").lower()))
    if at.strip() in ("at", "#") and ((dot == "." and at.strip() == "at") or (at == "#" and domain not in _PROVIDERS)):
        return
    if at.strip() == "at" and domain.partition(".")[0] in _COMMON:
        return  # "look at the dot com bubble"
    if (at.strip() == "@" and dot == ".") or _RESERVED.search(f"{domain}.{candidate.match.group(5)}".lower()):
        return  # the plain form is for the other detector
    yield "email", (candidate.start, candidate.end, 0.9)


_CALLED = Words(
    r"phone|\btel\b|\bcall|\bring\b|mobile|\bcell|whatsapp|wechat|\btext\b|\bsms\b|\bfax\b|contact|reach|dial|hotline",
    "电话|手机|拨打|致电|联系|微信|号码|热线|座机|短信",
)
_NOT_CALLED = Words(
    r"order|track|invoice|\bref\b|reference|ticket|serial|\bsku\b|isbn|imei|parcel|model|part n|\bcase\b|batch|product",
    r"issue|commit|build|version|timestamp|\bpo\b|\buid\b|user id|\bid[:=# ]|#\z|epoch|amount|price|total|balance",
    r"population|[$¥€] ?\z|订单|单号|运单|快递|流水|编号|发票|货号|批次|型号|序列号|工号|学号|金额|余额|人口|时间戳",
    r"\bqq\b|群号|版本",
)
_SPOKEN = {"zero": "0", "oh": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
           "seven": "7", "eight": "8", "nine": "9"}
_REGIONS = ("US", "CN", "GB")


def _phone(candidate: Candidate) -> Iterator[tuple[str, Span]]:
    written = candidate.found
    start, end = candidate.start, candidate.end
    if not candidate.alone("_=/") or re.search(r"[0-9][:.]$|-$", candidate.text[max(0, start - 2):start]):
        return
    if re.match(r"[-.:][0-9]", candidate.text[end:end + 2]):
        return
    if re.fullmatch(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}", written):
        return  # an IP address
    digits = re.sub(r"[^0-9]", "", written)
    if not 7 <= len(digits) <= 15 or (
        len(re.findall(r"[0-9]+", written)) > 6 and not re.fullmatch(r"\+?(?:[0-9][ .\-]{1,3})+[0-9]", written)
    ):
        return
    said = named(candidate.before(40), _CALLED, _NOT_CALLED)
    if said is False:
        return
    if (score := _dialled(written, digits, said=bool(said))) is not None:
        yield "phone", (start, end, score)


def _dialled(written: str, digits: str, *, said: bool) -> float | None:
    """How sure it is that digits are a telephone number; None if they are not."""
    if written.startswith("+"):
        return 1.0 if _known("+" + digits.replace("+", ""), None) else None
    if re.fullmatch(r"1[3-9][0-9]{9}", digits):
        return 0.95 if _known(digits, "CN") else None
    if re.fullmatch(r"0[0-9]{2,3}[ -][1-9][0-9]{6,7}", written):
        return 0.9 if _known(digits, "CN") else None
    if re.fullmatch(r"(?:1[ .\-]?)?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[.\-])[2-9][0-9]{2}[ .\-][0-9]{4}", written):
        return 0.9 if _known(digits, "US") else None
    if said and (
        any(_known(digits, region) for region in _REGIONS) or (digits[:2] == "00" and _known("+" + digits[2:], None))
    ):
        return 0.9
    return None


def _spoken(candidate: Candidate) -> Iterator[tuple[str, Span]]:
    digits = "".join(_SPOKEN[word] for word in re.findall(r"[a-z]+", candidate.found.lower()))
    said = named(candidate.before(40), _CALLED, _NOT_CALLED)
    if said is not False and _dialled(digits, digits, said=bool(said)) is not None:
        yield "phone", (candidate.start, candidate.end, 0.9)


@lru_cache(maxsize=8192)
def _known(digits: str, region: str | None) -> bool:
    phonenumbers = require("phonenumbers")
    try:
        return bool(phonenumbers.is_valid_number(phonenumbers.parse(digits, region)))
    except phonenumbers.NumberParseException:
        return False


_VERSION = re.compile(
    r"(?:version|\bver\.?|\bv|build|release|firmware|driver|section|chapter|clause|版本|版|固件|第|§)[ :]{0,2}$"
)
_HOSTS = Words(
    r"\bips?\b|address|\bhost|server|\bfrom\b|login|\bdns\b|\bping|\bssh\b|client|peer|gateway|connect|request|attack|block",
    r"trace|router|proxy|firewall|://|\bto\b|\bat\b|@|地址|来源|来自|服务器|主机|攻击|登录|连接|访问",
)


def _ipv4(candidate: Candidate) -> Iterator[tuple[str, Span]]:
    after = candidate.text[candidate.end:candidate.end + 2]
    if (not candidate.alone("-_.") and not re.fullmatch(r"\.(?:[^0-9a-zA-Z]|)", after)) or not _is_global(
        candidate.found
    ):
        return
    before = candidate.before(40)
    # A version of four numbers begins with a small one: there it has to be said that it is an address.
    if _VERSION.search(before) or (
        int(candidate.found.partition(".")[0]) < 30 and _HOSTS.last(before) < 0 and after[:1] != ":"
    ):
        return
    yield "ip", (candidate.start, candidate.end, 0.9)


def _ipv6(candidate: Candidate) -> Iterator[tuple[str, Span]]:
    # Addresses that are given out begin with 2 or 3; a name such as dead::beef does not, and a time has no four groups.
    if candidate.alone(":_") and re.match(r"[23][0-9a-f]{3}:", candidate.found.lower()) and _is_global(candidate.found):
        yield "ip", (candidate.start, candidate.end, 0.95)


def _is_global(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return found.is_global and not found.is_multicast


CONTACTS = (
    Detector("pii", {"email": "an e-mail address"}, _PLAIN, _email, ("@",)),
    Detector("pii", {"email": "an e-mail address, written around"}, _AROUND, _written_around),
    Detector("pii", {"phone": "a telephone number of a plan that exists"},
             r"(?:\+ ?|\()?[0-9](?:[ .\-()]{0,3}[0-9]){6,}", _phone, DIGITS),
    Detector("pii", {"phone": "a telephone number in words"},
             rf"(?i)\b(?:(?:{'|'.join(_SPOKEN)})[ ,.\-]{{1,2}}){{6,14}}(?:{'|'.join(_SPOKEN)})\b", _spoken),
    Detector("pii", {"ip": "a public IP address"}, r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}", _ipv4, (".",)),
    Detector("pii", {"ip": "a public IP address"}, r"(?i)[0-9a-f]{1,4}(?::[0-9a-f]{0,4}){2,7}", _ipv6, (":",)),
)
