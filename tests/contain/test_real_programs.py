"""Programs that live on the supervised calls behave as outside: each runs on the host and in a sandbox, says the same.

What is compared is what a program prints. Numbers that differ from run to run (ports, pids) are not printed.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from corral.actions import Kind, Verdict
from corral.sandbox.box import Sandbox
from tests.contain.attacks import PYTHON
from tests.contain.conftest import Compile, MakeBox

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TIMEOUT = 100


def need(*programs: str) -> None:
    """Skips where one of them is not on this machine."""
    for program in programs:
        if shutil.which(program, path=PATH) is None:
            pytest.skip(f"{program} is not on this machine")


def environment(home: Path | str) -> dict[str, str]:
    return {"PATH": PATH, "HOME": str(home), "LANG": "C.UTF-8", "TMPDIR": "/tmp"}


def outside(argv: list[str], directory: Path) -> tuple[int, str]:
    """What a program says on the host, where it works in a directory of its own."""
    own = directory.parent / "outside"
    shutil.copytree(directory, own, symlinks=True)
    result = subprocess.run(
        argv, cwd=own, env=environment(own), stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT
    )
    assert result.returncode == 0, (result.stdout[-3000:], result.stderr[-3000:])
    return result.returncode, result.stdout.decode()


async def within(box: Sandbox, argv: list[str]) -> tuple[int, str]:
    """The same in a sandbox."""
    result = await box.exec(argv, env=environment("/home/agent"), timeout=TIMEOUT)
    assert result.exit_code == 0, (result.exit_code, result.stdout[-3000:], result.stderr[-3000:])
    return result.exit_code, result.stdout.decode()


async def same(box: Sandbox, workspace: Path, argv: list[str]) -> str:
    """Runs it here and there, compares, and returns what both said."""
    expected = outside(argv, workspace)
    assert await within(box, argv) == expected
    assert expected[1].strip()
    return expected[1]


# ---- the calls themselves ----

SEMANTICS = r"""
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
static volatile int signals;
static void on_signal(int number) { signals++; }
static void handle(int flags) {
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = flags};
    sigaction(SIGALRM, &action, 0);
    signals = 0;
}
static void timer(int milliseconds) {  /* again and again, so that none is missed */
    struct itimerval value = {{0, milliseconds * 1000}, {0, milliseconds * 1000}};
    setitimer(ITIMER_REAL, &value, 0);
}
static void tell(const char *what, long result) {
    printf("%s: %s\n", what, result < 0 ? strerrorname_np(errno) : "ok");
}
static struct sockaddr_in bound(int fd) {
    struct sockaddr_in own = {AF_INET, 0, {htonl(0x7f000001)}};
    socklen_t length = sizeof own;
    bind(fd, (void *)&own, sizeof own);
    getsockname(fd, (void *)&own, &length);
    return own;
}
static int tcp(int flags) { return socket(AF_INET, SOCK_STREAM | flags, 0); }
static int error_of(int fd) {
    int error = -1; socklen_t length = sizeof error;
    getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length);
    return error;
}
#define TO(address) (void *)&(address), sizeof (address)
int main(void) {
    char data[70000] = "data";
    int server = tcp(0), dead = tcp(0);
    struct sockaddr_in there = bound(server), nobody = bound(dead);
    listen(server, 16);

    int plain = tcp(0);
    tell("connect", connect(plain, TO(there)));
    tell("connect again", connect(plain, TO(there)));
    tell("connect to nobody", connect(tcp(0), TO(nobody)));
    int free = tcp(SOCK_NONBLOCK);
    int started = connect(free, TO(there));
    printf("not waiting: %s\n", started == 0 ? "ok" : errno == EINPROGRESS ? "EINPROGRESS" : strerrorname_np(errno));
    struct pollfd watch = {free, POLLOUT};
    printf("poll: %d %x\n", poll(&watch, 1, 5000), watch.revents);
    printf("outcome: %d\n", error_of(free));
    int refused = tcp(SOCK_NONBLOCK);
    connect(refused, TO(nobody));
    watch = (struct pollfd){refused, POLLOUT};
    poll(&watch, 1, 5000);
    printf("refused: %x %s\n", watch.revents & POLLERR, strerrorname_np(error_of(refused)));
    printf("flags: %d %d\n", fcntl(plain, F_GETFL) & O_NONBLOCK, fcntl(free, F_GETFL) & O_NONBLOCK);
    tell("bind again", bind(server, TO(there)));
    tell("bind in use", bind(tcp(0), TO(there)));
    tell("listen on a datagram socket", listen(socket(AF_INET, SOCK_DGRAM, 0), 1));
    tell("connect what is no socket", connect(0, TO(there)));
    tell("connect nothing", connect(999, TO(there)));
    tell("connect a listener", connect(server, TO(there)));
    tell("a short address", connect(tcp(0), (void *)&there, 4));
    tell("another family", connect(tcp(0), (void *)&(struct sockaddr_un){AF_UNIX, "/x"}, 10));
    tell("send unconnected", sendto(tcp(0), data, 4, MSG_NOSIGNAL, 0, 0));

    /* A Unix socket whose queue is full: connect waits, and a signal ends the wait. */
    struct sockaddr_un path = {AF_UNIX, "queue.sock"};
    int queue = socket(AF_UNIX, SOCK_STREAM, 0);
    unlink(path.sun_path);
    tell("unix bind", bind(queue, TO(path)));
    listen(queue, 0);
    tell("unix connect", connect(socket(AF_UNIX, SOCK_STREAM, 0), TO(path)));
    tell("unix queue full", connect(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0), TO(path)));
    handle(0);
    timer(50);
    tell("unix interrupted", connect(socket(AF_UNIX, SOCK_STREAM, 0), TO(path)));
    timer(0);
    struct timeval patience = {0, 100000};
    int brief = socket(AF_UNIX, SOCK_STREAM, 0);
    setsockopt(brief, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    tell("unix out of time", connect(brief, TO(path)));
    handle(SA_RESTART);
    pid_t later = fork();
    if (later == 0) { timer(0); usleep(400000); accept(queue, 0, 0); usleep(200000); _exit(0); }
    timer(50);
    tell("unix restarted", connect(socket(AF_UNIX, SOCK_STREAM, 0), TO(path)));
    timer(0);
    printf("signals: %s\n", signals > 0 ? "came" : "none");
    kill(later, SIGKILL);
    waitpid(later, 0, 0);

    /* accept(2) is not supervised; it must not notice. */
    for (int i = 0; i < 2; i++) close(accept(server, 0, 0));
    handle(0);
    timer(50);
    tell("accept interrupted", accept(server, 0, 0));
    timer(0);
    handle(SA_RESTART);
    later = fork();
    if (later == 0) { timer(0); usleep(300000); connect(tcp(0), TO(there)); usleep(200000); _exit(0); }
    timer(50);
    tell("accept restarted", accept(server, 0, 0));
    timer(0);
    waitpid(later, 0, 0);

    /* Datagrams. */
    int one = socket(AF_INET, SOCK_DGRAM, 0), two = socket(AF_INET, SOCK_DGRAM, 0);
    struct sockaddr_in to = bound(two);
    tell("sendto", sendto(one, data, 4, 0, TO(to)));
    tell("too long", sendto(one, data, sizeof data, 0, TO(to)));
    struct iovec parts[3] = {{"one", 3}, {"", 0}, {"two", 3}};
    struct msghdr message = {&to, sizeof to, parts, 3};
    printf("sendmsg: %zd\n", sendmsg(one, &message, 0));
    struct mmsghdr many[3] = {{message}, {message}, {message}};
    many[1].msg_hdr.msg_iovlen = 1;
    printf("sendmmsg: %d", sendmmsg(one, many, 3, 0));
    printf(" %u %u %u\n", many[0].msg_len, many[1].msg_len, many[2].msg_len);
    for (int i = 0; i < 5; i++) printf("%zd ", recv(two, data, sizeof data, 0));
    message.msg_iov = 0, message.msg_iovlen = 2000;
    tell("\ntoo many parts", sendmsg(one, &message, 0));
    sendto(one, data, 4, 0, TO(nobody));
    usleep(50000);
    tell("nobody there", sendto(one, data, 4, 0, TO(nobody)));

    /* Streams. */
    int pair[2];
    socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
    union { char space[CMSG_SPACE(sizeof(int))]; struct cmsghdr header; } control = {
        .header = {CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS}};
    *(int *)CMSG_DATA(&control.header) = two;
    struct msghdr rights = {0, 0, parts, 3, &control, sizeof control};
    printf("rights: %zd\n", sendmsg(pair[0], &rights, 0));
    struct iovec space = {data, sizeof data};
    struct msghdr got = {0, 0, &space, 1, &control, sizeof control};
    printf("got: %zd %d\n", recvmsg(pair[1], &got, MSG_CMSG_CLOEXEC), got.msg_controllen > 0);
    *(int *)CMSG_DATA(&control.header) = 999;
    tell("rights to nothing", sendmsg(pair[0], &rights, 0));
    memset(data, 'x', sizeof data);
    struct msghdr stream = {0, 0, &space, 1};
    long total = 0, part;
    while ((part = sendmsg(pair[0], &stream, MSG_DONTWAIT)) > 0) total += part;
    tell("full", part);
    printf("total: %s\n", total > 100000 ? "many" : "few");
    later = fork();
    if (later == 0) {
        usleep(100000);
        while (total > 0) total -= read(pair[1], data, sizeof data);
        while (total > -(long)sizeof data) total -= read(pair[1], data, sizeof data);
        _exit(0);
    }
    printf("waited: %zd\n", sendmsg(pair[0], &stream, 0));
    waitpid(later, 0, 0);
    close(pair[1]);
    signal(SIGPIPE, SIG_IGN);
    tell("broken", sendmsg(pair[0], &stream, 0));
    if (fork() == 0) { signal(SIGPIPE, SIG_DFL); sendmsg(pair[0], &stream, 0); _exit(0); }
    int status;
    wait(&status);
    printf("signal: %d\n", WTERMSIG(status));
}
"""


async def test_the_calls_keep_their_semantics(box: Sandbox, workspace: Path, compile_c: Compile) -> None:
    """Blocking, not blocking, interrupted, restarted, out of time; refused, full, broken."""
    compile_c(SEMANTICS, "semantics")
    said = await same(box, workspace, ["./semantics"])
    lines = {"unix interrupted: EINTR", "unix restarted: ok", "unix out of time: EAGAIN", "refused: 8 ECONNREFUSED"}
    assert lines <= set(said.splitlines())


# ---- runtimes ----

ASYNCIO = """
import asyncio, os, socket, tempfile

async def serve(reader, writer):
    while line := await reader.readline():
        writer.write(line.upper())
        await writer.drain()
    writer.close()

async def talk(opening):
    reader, writer = await opening
    answers = []
    for number in range(20):
        writer.write(b"line %d\\n" % number)
        answers.append(await reader.readline())
    writer.close()
    return answers

class Echo(asyncio.DatagramProtocol):
    def connection_made(self, transport):
        self.transport = transport
    def datagram_received(self, data, address):
        self.transport.sendto(data.upper(), address)

class Client(asyncio.DatagramProtocol):
    def __init__(self):
        self.answers = asyncio.Queue()
    def datagram_received(self, data, address):
        self.answers.put_nowait(data)

async def main():
    expected = [b"LINE %d\\n" % number for number in range(20)]
    for host in ("127.0.0.1", "::1"):
        server = await asyncio.start_server(serve, host, 0)
        address = server.sockets[0].getsockname()[:2]
        talks = [talk(asyncio.open_connection(*address)) for _ in range(50)]
        print(host, await asyncio.gather(*talks) == [expected] * 50)
        server.close()
    with tempfile.TemporaryDirectory() as directory:
        for path in (directory + "/socket", "\\0asyncio"):
            server = await asyncio.start_unix_server(serve, path)
            opening = [talk(asyncio.open_unix_connection(path)) for _ in range(50)]
            print(len(path) > 10, await asyncio.gather(*opening) == [expected] * 50)
            server.close()
    loop = asyncio.get_running_loop()
    echo, _ = await loop.create_datagram_endpoint(Echo, ("127.0.0.1", 0))
    for connected in (True, False):
        there = echo.get_extra_info("sockname")
        how = {"remote_addr": there} if connected else {"local_addr": ("127.0.0.1", 0)}
        transport, client = await loop.create_datagram_endpoint(Client, **how)
        for number in range(50):
            transport.sendto(b"%d" % number, None if connected else there)
            await asyncio.wait_for(client.answers.get(), 10)
        print("datagrams", connected)
        transport.close()
    try:
        await asyncio.open_connection("127.0.0.1", 1)
    except OSError as error:
        print(type(error).__name__)
    server = socket.create_server(("127.0.0.1", 0), backlog=1)
    try:
        async with asyncio.timeout(0.3):
            await asyncio.gather(*(asyncio.open_connection(*server.getsockname()) for _ in range(8)))
    except TimeoutError:
        print("timeout")
asyncio.run(main())
"""


async def test_asyncio_servers_and_clients(box: Sandbox, workspace: Path) -> None:
    (workspace / "program.py").write_text(ASYNCIO)
    assert (await same(box, workspace, [PYTHON, "program.py"])).count("True") >= 4


MULTIPROCESSING = """
import multiprocessing as mp, multiprocessing.connection as connections, os, socket, sys, tempfile
from multiprocessing import reduction, shared_memory

def square(number):
    return number * number

def work(receiver, queue, name):
    fd = reduction.DupFd  # the module is there
    handle = reduction.recv_handle(receiver)
    with os.fdopen(handle, "rb") as file:
        queue.put(file.read())
    memory = shared_memory.SharedMemory(name)
    memory.buf[0] = 42
    memory.close()
    received = receiver.recv()
    received.sendall(b"over a socket that was passed")
    received.close()

def main(method):
    context = mp.get_context(method)
    with context.Pool(3) as pool:
        print(method, pool.map(square, range(10)), pool.apply_async(square, (7,)).get())
    queue, (receiver, sender) = context.Queue(), context.Pipe()
    memory = shared_memory.SharedMemory(create=True, size=16)
    child = context.Process(target=work, args=(receiver, queue, memory.name))
    child.start()
    with tempfile.TemporaryFile() as file:
        file.write(b"passed")
        file.seek(0)
        reduction.send_handle(sender, file.fileno(), child.pid)
        print(queue.get())
    one, two = socket.socketpair()
    sender.send(one)
    print(two.recv(100))
    child.join()
    print(child.exitcode, memory.buf[0])
    memory.close()
    memory.unlink()
    with context.Manager() as manager:
        shared = manager.dict()
        children = [context.Process(target=shared.__setitem__, args=(n, n)) for n in range(5)]
        [each.start() for each in children]
        [each.join() for each in children]
        print(sorted(shared.items()))
    for family in ("AF_INET", "AF_UNIX"):
        with connections.Listener(None, family, authkey=b"secret") as listener:
            with context.Pool(1) as pool:
                answer = pool.apply_async(ask, (listener.address,))
                with listener.accept() as connection:
                    connection.send({"asked": connection.recv()})
                print(answer.get())

def ask(address):
    with connections.Client(address, authkey=b"secret") as connection:
        connection.send("question")
        return connection.recv()

if __name__ == "__main__":
    main(sys.argv[1])
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
async def test_python_multiprocessing(box: Sandbox, workspace: Path, method: str) -> None:
    (workspace / "program.py").write_text(MULTIPROCESSING)
    assert "passed" in await same(box, workspace, [PYTHON, "program.py", method])


NODE = """
const http = require('http'), net = require('net'), dgram = require('dgram'), cluster = require('cluster');
const { fork, execFile } = require('child_process');
const listening = (server, where) => new Promise((done) => server.listen(where, () => done(server.address())));
const get = (options) => new Promise((done, failed) => http.get(options, (response) => {
  let body = ''; response.on('data', (data) => body += data).on('end', () => done(body)); }).on('error', failed));
async function main() {
  const server = http.createServer((request, response) => response.end('at ' + request.url));
  const { port } = await listening(server, { port: 0, host: '127.0.0.1' });
  const agent = new http.Agent({ keepAlive: true, maxSockets: 10 });
  const bodies = await Promise.all([...Array(100).keys()].map(
    (n) => get({ port, host: '127.0.0.1', path: '/' + n, agent })));
  console.log(bodies.every((body, n) => body === 'at /' + n));
  agent.destroy(); server.close();
  for (const path of ['node.sock', '\\0node']) {
    const unix = net.createServer((socket) => socket.pipe(socket));
    await listening(unix, { path });
    await new Promise((done) => { const socket = net.connect({ path }, () => socket.end('echo'));
      socket.on('data', (data) => console.log(String(data))).on('close', done); });
    unix.close();
  }
  const udp = dgram.createSocket('udp4');
  await new Promise((done) => udp.bind(0, '127.0.0.1', done));
  const client = dgram.createSocket('udp4');
  await new Promise((done) => { udp.on('message', (message) => { console.log(String(message)); done(); });
    client.send('datagram', udp.address().port, '127.0.0.1'); });
  udp.close(); client.close();
  await new Promise((done) => net.connect(1, '127.0.0.1').on('error', (error) => { console.log(error.code); done(); }));
  cluster.setupPrimary({ exec: __filename, args: ['worker'] });
  const worker = cluster.fork();
  const [address] = await new Promise((done) => cluster.on('listening', (_, address) => done([address])));
  console.log(await get({ port: address.port, host: '127.0.0.1' }));
  worker.kill();
  await new Promise((done) => worker.on('exit', done));
  await new Promise((done) => execFile('true', (error) => { console.log(error); done(); }));
}
if (cluster.isWorker) http.createServer((_, response) => response.end('worker')).listen(0, '127.0.0.1');
else main();
"""


async def test_node(box: Sandbox, workspace: Path) -> None:
    need("node")
    (workspace / "program.js").write_text(NODE)
    assert (await same(box, workspace, ["node", "program.js"])).split() == [
        *["true", "echo", "echo", "datagram", "ECONNREFUSED", "worker", "null"]
    ]


JAVA = """
import com.sun.net.httpserver.HttpServer;
import java.io.*;
import java.net.*;
import java.net.http.*;
import java.nio.ByteBuffer;
import java.nio.channels.*;
import java.nio.file.*;
public class Program {
  public static void main(String[] arguments) throws Exception {
    InetAddress here = InetAddress.getByName("127.0.0.1");
    HttpServer server = HttpServer.create(new InetSocketAddress(here, 0), 0);
    server.createContext("/", exchange -> {
      byte[] body = exchange.getRequestURI().getPath().getBytes();
      exchange.sendResponseHeaders(200, body.length);
      exchange.getResponseBody().write(body);
      exchange.close();
    });
    server.start();
    HttpClient client = HttpClient.newHttpClient();
    for (int n = 0; n < 20; n++) {
      URI uri = URI.create("http://127.0.0.1:" + server.getAddress().getPort() + "/" + n);
      String body = client.send(HttpRequest.newBuilder(uri).build(), HttpResponse.BodyHandlers.ofString()).body();
      if (!body.equals("/" + n)) throw new Exception(body);
    }
    server.stop(0);
    DatagramSocket one = new DatagramSocket(0, here), two = new DatagramSocket(0, here);
    one.send(new DatagramPacket("datagram".getBytes(), 8, here, two.getLocalPort()));
    DatagramPacket packet = new DatagramPacket(new byte[100], 100);
    two.receive(packet);
    System.out.println(new String(packet.getData(), 0, packet.getLength()));
    try { new Socket(here, 1); } catch (ConnectException refused) { System.out.println("refused"); }
    Path path = Path.of("java.sock");
    ServerSocketChannel local = ServerSocketChannel.open(StandardProtocolFamily.UNIX);
    local.bind(UnixDomainSocketAddress.of(path));
    SocketChannel channel = SocketChannel.open(UnixDomainSocketAddress.of(path));
    channel.write(ByteBuffer.wrap("local".getBytes()));
    ByteBuffer buffer = ByteBuffer.allocate(100);
    int count = local.accept().read(buffer);
    System.out.println(new String(buffer.array(), 0, count));
    Process process = new ProcessBuilder("echo", "child").start();
    System.out.print(new String(process.getInputStream().readAllBytes()));
    System.exit(process.waitFor());
  }
}
"""


async def test_java(box: Sandbox, workspace: Path, tmp_path: Path) -> None:
    need("java", "javac")
    (tmp_path / "Program.java").write_text(JAVA)
    subprocess.run(["javac", "-d", str(workspace), str(tmp_path / "Program.java")], check=True, timeout=TIMEOUT)
    said = await same(box, workspace, ["java", "-XX:TieredStopAtLevel=1", "-Xshare:auto", "Program"])
    assert said.split() == ["datagram", "refused", "local", "child"]


GO = """
package main

import ("fmt"; "io"; "net"; "net/http"; "os/exec")

func main() {
	listener, _ := net.Listen("tcp", "127.0.0.1:0")
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL.Path) })
	go http.Serve(listener, handler)
	for n := 0; n < 20; n++ {
		response, err := http.Get(fmt.Sprintf("http://%s/%d", listener.Addr(), n))
		if err != nil { panic(err) }
		body, _ := io.ReadAll(response.Body)
		if string(body) != fmt.Sprintf("/%d", n) { panic(string(body)) }
	}
	packets, _ := net.ListenPacket("udp", "127.0.0.1:0")
	sender, _ := net.Dial("udp", packets.LocalAddr().String())
	sender.Write([]byte("datagram"))
	buffer := make([]byte, 100)
	count, _, _ := packets.ReadFrom(buffer)
	fmt.Println(string(buffer[:count]))
	local, err := net.Listen("unix", "go.sock")
	if err != nil { panic(err) }
	go func() { c, _ := local.Accept(); io.Copy(c, c); c.Close() }()
	client, err := net.Dial("unix", "go.sock")
	if err != nil { panic(err) }
	client.Write([]byte("local"))
	client.(*net.UnixConn).CloseWrite()
	body, _ := io.ReadAll(client)
	fmt.Println(string(body))
	_, err = net.Dial("tcp", "127.0.0.1:1")
	fmt.Println(err)
	out, err := exec.Command("echo", "child").Output()
	fmt.Println(string(out), err)
}
"""


async def test_go(box: Sandbox, workspace: Path, tmp_path: Path) -> None:
    need("go")
    (tmp_path / "program.go").write_text(GO)
    env = {**environment(tmp_path), "GOCACHE": str(tmp_path / "cache"), "GOFLAGS": "-mod=mod"}
    build = ["go", "build", "-o", str(workspace / "program"), str(tmp_path / "program.go")]
    subprocess.run(build, check=True, env=env, timeout=TIMEOUT)
    assert "connection refused" in await same(box, workspace, ["./program"])


# ---- tools ----

SSH = """
import socket, subprocess, threading
server = socket.create_server(("127.0.0.1", 0))
def serve():
    connection, _ = server.accept()
    with connection:
        connection.sendall(b"SSH-2.0-dummy\\r\\n")
        print(connection.makefile("rb").readline().startswith(b"SSH-2.0-OpenSSH"))
thread = threading.Thread(target=serve)
thread.start()
command = ["ssh", "-F", "none", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-v", "-p",
           str(server.getsockname()[1]), "somebody@127.0.0.1"]
client = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
thread.join()
print(client.returncode, "Connection established" in client.stderr, "remote software version dummy" in client.stderr)
refused = subprocess.run([*command[:-2], "1", command[-1]], stdin=subprocess.DEVNULL, capture_output=True, text=True)
print(refused.returncode, "Connection refused" in refused.stderr)
"""


async def test_ssh(box: Sandbox, workspace: Path) -> None:
    need("ssh")
    (workspace / "program.py").write_text(SSH)
    assert (await same(box, workspace, [PYTHON, "program.py"])) == "True\n255 True True\n255 True\n"


SERVE = """
import http.server, os, socket, subprocess, sys, threading
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
http.server.SimpleHTTPRequestHandler.log_message = lambda *_: None
threading.Thread(target=server.serve_forever, daemon=True).start()
port = str(server.server_port)
command = [word.replace("PORT", port) for word in sys.argv[1:]]
result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
print(result.returncode)
print(result.stdout.replace(port, "PORT"), flush=True)
os._exit(0)  # whatever the server's threads are about to say of connections that were cut
"""


async def test_curl(box: Sandbox, workspace: Path) -> None:
    need("curl")
    (workspace / "program.py").write_text(SERVE)
    names = [f"http://127.0.0.1:PORT/file.txt?{number}" for number in range(10)]
    argv = [PYTHON, "program.py", "curl", "-s", "--parallel", "--noproxy", "*", *names]
    assert (await same(box, workspace, argv)).count("original") == 10


async def test_nmap(box: Sandbox, workspace: Path) -> None:
    """A scan by connecting, of a range in which one port is open."""
    need("nmap")
    (workspace / "program.py").write_text(SERVE)
    scan = ["nmap", "-sT", "-Pn", "-n", "--unprivileged", "-oG", "-", "-p", "PORT,1-100", "127.0.0.1"]
    expected = outside([PYTHON, "program.py", *scan], workspace)[1]
    said = (await within(box, [PYTHON, "program.py", *scan]))[1]
    ports = [[line for line in text.splitlines() if "Ports:" in line] for text in (expected, said)]
    assert ports[0] and "PORT/open/tcp" in ports[0][0] and "PORT/open/tcp" in ports[1][0]
    # What else listens on the host's loopback is not there inside.
    assert ports[1][0].count("/open/") == 1


async def test_git_over_file_and_daemon(box: Sandbox, workspace: Path) -> None:
    need("git")
    script = """
    set -e
    export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
    export GIT_AUTHOR_DATE='2020-01-01T00:00:00Z' GIT_COMMITTER_DATE='2020-01-01T00:00:00Z' GIT_CONFIG_NOSYSTEM=1
    git init -q -b main origin
    cp file.txt origin; git -C origin add .; git -C origin commit -q -m one
    git clone -q --bare "file://$PWD/origin" served/repository.git
    touch served/repository.git/git-daemon-export-ok
    port=$(python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
    git daemon --listen=127.0.0.1 --port=$port --base-path="$PWD/served" --enable=receive-pack --reuseaddr \
      "$PWD/served" 2>/dev/null & daemon=$!
    trap 'kill $daemon' EXIT
    url=git://127.0.0.1:$port/repository.git
    for i in $(seq 200); do git ls-remote -q $url >refs 2>/dev/null && break; sleep 0.05; done
    cat refs
    git clone -q $url clone
    echo more >> clone/file.txt; git -C clone commit -q -a -m two; git -C clone push -q origin main
    git -C served/repository.git log --format='%h %s'
    """
    (workspace / "script").write_text(script)
    said = await same(box, workspace, ["/bin/bash", "script"])
    assert [line.split()[1] for line in said.splitlines()[-2:]] == ["two", "one"]


async def test_d_bus(box: Sandbox, workspace: Path) -> None:
    """A bus of one's own: Unix sockets with credentials and passed descriptors."""
    need("dbus-daemon", "dbus-send")
    (workspace / "bus.conf").write_text(
        '<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" '
        '"http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd"><busconfig><type>session</type>'
        "<listen>unix:path=/tmp/DIRECTORY/bus</listen><auth>EXTERNAL</auth><policy context='default'>"
        "<allow send_destination='*' eavesdrop='true'/><allow eavesdrop='true'/><allow own='*'/></policy></busconfig>"
    )
    script = """
    set -e
    directory=$(mktemp -d /tmp/bus-XXXXXX)
    sed "s|/tmp/DIRECTORY|$directory|" bus.conf >own.conf
    dbus-daemon --config-file=own.conf --nofork --print-address >address & daemon=$!
    trap 'kill $daemon; rm -rf $directory' EXIT
    for i in $(seq 200); do [ -s address ] && break; sleep 0.05; done
    export DBUS_SESSION_BUS_ADDRESS=$(cat address)
    call="dbus-send --session --print-reply=literal --dest=org.freedesktop.DBus / org.freedesktop.DBus"
    $call.ListNames
    $call.RequestName string:com.example.Name uint32:0
    [ "$($call.GetConnectionUnixUser string:org.freedesktop.DBus | tr -dc '0-9 ' | awk '{print $NF}')" = "$(id -u)" ]
    echo as oneself
    """
    (workspace / "script").write_text(script)
    assert "as oneself" in await same(box, workspace, ["/bin/bash", "script"])


# ---- debuggers ----


@pytest.mark.parametrize("tool", ["gdb", "strace"])
async def test_debuggers_are_told_no_and_say_so(make_box: MakeBox, workspace: Path, tool: str) -> None:
    """They end with an error that names it, they do not hang; and there is a record."""
    need(tool)
    box = await make_box()
    argv = ["gdb", "-nx", "-q", "-batch", "-ex", "run", "/bin/true"] if tool == "gdb" else ["strace", "-f", "/bin/true"]
    result = await box.exec(argv, env=environment("/home/agent"), timeout=TIMEOUT)
    said = result.stdout + result.stderr
    assert b"Operation not permitted" in said or b"EPERM" in said
    assert b"exited normally" not in said
    names = {one.action.name: one for one in box.core.supervision.recent.all() if one.action.kind is Kind.KERNEL}
    assert names["kernel.ptrace"].verdict is Verdict.DENY
    assert any(denial.action == "kernel.ptrace" for denial in result.denials)
    assert b"kernel.ptrace" in result.stderr or b"ptrace" in result.stderr


async def test_a_debugger_cannot_attach_either(box: Sandbox) -> None:
    need("gdb")
    victim = await box.start_process(["/bin/sleep", "600"])
    find = "until pgrep -x sleep; do :; done"  # it may not have come to its own name yet
    pid = (await box.exec(["/bin/sh", "-c", find], timeout=TIMEOUT)).text.strip()
    result = await box.exec(["gdb", "-nx", "-q", "-batch", "-p", pid], env=environment("/home/agent"), timeout=TIMEOUT)
    assert b"Operation not permitted" in result.stdout + result.stderr
    assert (await box.exec(["kill", "-0", pid])).exit_code == 0
    victim.kill()
    await victim.wait()
