# SPDX-License-Identifier: Apache-2.0
"""Who may connect and who may administer, by the peer's credentials.  Needs root, to be others."""
import os
import signal
import subprocess
import sys

from harness import Client, Daemon, Refused, main, small_model

ALICE, BOB, GROUP = 54321, 54322, 54330  # ids are enough: no such user needs to exist


def attempt(socket, wanted, path):
    """Run as another user: prints what it was allowed."""
    done = []
    try:
        client = Client(socket)
        done.append("admin" if "admin" in client.hello["capabilities"] else "connected")
        if wanted == "load":
            client.call("model.load", name="by-another", path=path)
            done.append("loaded")
        elif wanted == "stay":
            print(" ".join(done), flush=True)
            done = [str(client.wait_end())]
    except Refused as refused:
        done.append(refused.name)
    except PermissionError:
        done.append("no-socket")
    print(" ".join(done), flush=True)


def as_user(daemon, user, group, wanted="connect", path="", groups=()):
    return subprocess.Popen([sys.executable, __file__, "attempt", daemon.socket, wanted, path],
                            stdout=subprocess.PIPE, text=True, user=user, group=group,
                            extra_groups=list(groups))


def outcome(child):
    return child.communicate()[0].split("\n")[0]


def open_up(directory):
    os.chmod(directory, 0o755)


def users_and_groups_are_held_to_the_configuration(directory):
    open_up(directory)
    path, _ = small_model(directory)
    daemon = Daemon(directory, "--mode=0666", f"--allow-users={ALICE}",
                    f"--allow-groups={GROUP}")
    assert outcome(as_user(daemon, ALICE, ALICE)) == "connected"
    assert outcome(as_user(daemon, BOB, BOB)) == "denied"
    assert outcome(as_user(daemon, BOB, GROUP)) == "connected"
    assert outcome(as_user(daemon, BOB, BOB, groups=[GROUP])) == "connected"
    assert outcome(as_user(daemon, ALICE, ALICE, "load", path)) == "connected denied"
    with daemon.connect() as root:
        assert "admin" in root.hello["capabilities"]
    daemon.stop()


def administrators_are_named(directory):
    open_up(directory)
    path, _ = small_model(directory)
    daemon = Daemon(directory, "--mode=0666", f"--admin-users={ALICE}")
    assert outcome(as_user(daemon, ALICE, ALICE, "load", path)) == "admin loaded"
    assert outcome(as_user(daemon, BOB, BOB, "load", path)) == "connected denied"
    daemon.stop()


def the_mode_keeps_others_out(directory):
    open_up(directory)
    daemon = Daemon(directory)
    assert outcome(as_user(daemon, BOB, BOB)) == "no-socket"
    daemon.stop()


def hangup_ends_the_sessions_of_users_who_lost_their_right(directory):
    open_up(directory)
    config = os.path.join(directory, "c.conf")
    with open(config, "w", encoding="ascii") as file:
        file.write(f"mode = 0666\nallow-users = {ALICE}, {BOB}\n")
    daemon = Daemon(directory, f"--config={config}")
    alice, bob = (as_user(daemon, user, user, "stay") for user in (ALICE, BOB))
    assert alice.stdout.readline() == bob.stdout.readline() == "connected\n"
    with open(config, "w", encoding="ascii") as file:
        file.write(f"mode = 0666\nallow-users = {ALICE}\n")
    daemon.signal(signal.SIGHUP)
    assert bob.stdout.readline() == "denied\n"
    assert outcome(as_user(daemon, BOB, BOB)) == "denied"
    assert outcome(as_user(daemon, ALICE, ALICE)) == "connected"
    daemon.stop()
    assert alice.stdout.readline() == "None\n"  # the daemon's end, and no error
    for child in (alice, bob):
        child.wait()
        child.stdout.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["attempt"]:
        attempt(*sys.argv[2:])
        sys.exit(0)
    if os.geteuid() != 0:
        print("SKIP: only root can be other users")
        sys.exit(77)
    # the harness must be readable by those users
    if subprocess.run([sys.executable, "-c", "import sys; open(sys.argv[1])", __file__],
                      user=ALICE, group=ALICE, extra_groups=[], check=False,
                      stderr=subprocess.DEVNULL).returncode != 0:
        print("SKIP: other users cannot read the tests' directory")
        sys.exit(77)
    main([users_and_groups_are_held_to_the_configuration, administrators_are_named,
          the_mode_keeps_others_out, hangup_ends_the_sessions_of_users_who_lost_their_right])
