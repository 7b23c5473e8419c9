"""Which hosts webhooks may name, and where their names may lead."""

import pytest
from pydantic import ValidationError

from server.settings import Settings
from server.webhooks import fault_of_address, fault_of_webhook, listing_of

HOSTS = ["hooks.example.com", "*.corp.example", "ci.example:8443", "10.1.2.3", "localhost:9000",
         "127.0.0.1", "[::1]:8080"]  # fmt: skip


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com/x", "https://HOOKS.example.com:443/", "https://a.corp.example",
        "https://a.b.corp.example/x?y=z", "https://ci.example:8443/", "https://10.1.2.3/x",
        "http://localhost:9000/x", "http://127.0.0.1/", "https://127.0.0.1/",
        "http://[::1]:8080/x",
    ],
)  # fmt: skip
def test_hosts_of_the_list_may_be_told(url):
    assert fault_of_webhook(url, HOSTS, has_secret=True) is None


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/", "https://evil-hooks.example.com/", "https://hooks.example.com.evil/",
        "https://hooks.example.com:8443/", "https://hooks.example.com./", "https://corp.example/",
        "https://evilcorp.example/", "https://ci.example/", "https://ci.example:443/",
        "https://10.1.2.4/", "https://[::ffff:10.1.2.3]/", "https://167838211/",
        "https://0x0a010203/", "https://10.1.515/", "http://hooks.example.com/",
        "http://a.corp.example/", "http://10.1.2.3/", "http://localhost/", "http://localhost:9001/",
        "http://127.0.0.2/", "http://127.1/", "http://2130706433/", "http://[::1]/",
        "https://169.254.169.254/", "https://metadata.google.internal/", "https://1.corp.example:1/",
    ],
)  # fmt: skip
def test_no_other_host_may_be(url):
    assert fault_of_webhook(url, HOSTS, has_secret=True)


def test_an_address_does_not_pass_for_a_suffix():
    assert listing_of("1.2.3.4", 443, "https", ["*.3.4"]) is None
    assert listing_of("a.3.4", 443, "https", ["*.3.4"]) == "suffix"


ALWAYS = ["169.254.169.254", "169.254.0.1", "fe80::1", "fe80::1%eth0", "fd00:ec2::254",
          "100.100.100.200", "168.63.129.16", "127.0.0.1", "127.8.8.8", "::1", "0.0.0.0", "::",
          "224.0.0.1", "ff02::1", "::ffff:169.254.169.254", "::ffff:127.0.0.1",
          "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "240.0.0.1", "255.255.255.255", "x"]  # fmt: skip
PRIVATE = ["10.0.0.5", "192.168.1.1", "172.16.0.1", "fd12:3456::1", "100.64.0.1", "::ffff:10.0.0.5"]
PUBLIC = ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"]


@pytest.mark.parametrize("address", ALWAYS + PRIVATE + PUBLIC)
def test_what_a_name_resolves_to_is_checked(address):
    """A name says where others want it to lead; an address of the list says so itself."""
    assert bool(fault_of_address(address, "hooks.example.com", "host")) == (address in ALWAYS)
    assert bool(fault_of_address(address, "a.corp.example", "suffix")) == (address not in PUBLIC)
    assert bool(fault_of_address(address, address, "address")) == (address == "x")


def test_localhost_is_this_machine_and_nothing_else():
    assert fault_of_address("127.0.0.1", "localhost", "host") is None
    assert fault_of_address("::1", "localhost", "host") is None
    assert fault_of_address("169.254.169.254", "localhost", "host")


@pytest.mark.parametrize(
    "entry", ["", "http://x", "a b", "*", "*x", "a.*", "x/y", "x:", "u@x", "::1"]
)
def test_a_list_of_hosts_holds_hosts(entry):
    with pytest.raises(ValidationError):
        Settings(webhook_hosts=[entry])


def test_a_short_secret_is_none():
    with pytest.raises(ValidationError):
        Settings(webhook_secret="short")
